"""By how much a metric that follows from probabilities varies by chance: the bootstrap, images drawn anew.

Of one class an image, what follows from the answers alone is drawn by kinds of answers, which are fewer than images
(:mod:`launcher.report.intervals`). This is of all else, and of any number of classes an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from launcher.engine.distributed import gather_rows
from launcher.engine.validating.ranking import CALIBRATION_BINS, Ranking, areas, calibration_bin
from launcher.recipe.metrics import METRICS, Counts
from launcher.report.intervals import DRAWS, Z_95

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FEWEST_DRAWS = 25
"""Enough for the first digit of a deviation."""
MOST_DRAWN = 5_000_000
"""Probabilities in all draws together, less than a second of AUROC; of more there are fewer draws, or none."""
MOST_CLASSES = 1_000
"""Of more the draws of a bootstrap take seconds: nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a rank's validation images were answered; :meth:`gather` gives that of all ranks."""

    probabilities: torch.Tensor
    """Float32 N x C."""
    true: torch.Tensor
    """Which classes are true, bool N x C."""
    hits: torch.Tensor
    """Whether the likeliest class is right, and whether one of the five likeliest is: by the logits, of which fewer are
    equal than of probabilities; bool N x 2."""
    samples: int
    """Images of all ranks."""
    threshold: float | None = None
    """The probability from which on an image is said to have a class; None: it has one class."""

    def gather(self) -> Scores:
        """On the host, in the order of the ranks. Every rank must call it."""
        probabilities = gather_rows(self.probabilities).cpu()
        known = gather_rows(torch.cat([self.true, self.hits], dim=1).to(torch.uint8)).cpu().bool()
        return replace(self, probabilities=probabilities, true=known[:, :-2], hits=known[:, -2:])

    @property
    def answered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is said to be so with which confidence, and whether it is; N x 1 of one class an image, else N x C."""
        if self.threshold is not None:
            return self.probabilities, self.true
        return self.probabilities.amax(dim=1, keepdim=True), self.hits[:, :1]


def scores_of(
    ranking: Ranking, hits: Sequence[torch.Tensor], samples: int, *, threshold: float | None = None
) -> Scores | None:
    """What a rank's validation keeps of probabilities, all of them counted; None on every rank: there are too many.

    Args:
        ranking: has them.
        hits: of each batch, as :func:`launcher.engine.metrics.hits_of` gives them.
        samples: images of all ranks.
        threshold: as :class:`Scores` has it.
    """
    kept = ranking.kept()
    if kept is None or kept[0].shape[1] > MOST_CLASSES or samples * kept[0].shape[1] > MOST_DRAWN // FEWEST_DRAWS:
        return None
    probabilities, true = kept
    of_images = torch.cat([true.new_empty(0, 2), *(each.bool() for each in hits)])
    return Scores(probabilities=probabilities, true=true, hits=of_images, samples=samples, threshold=threshold)


def noise_of_gain(name: str, before: Scores, now: Scores) -> float | None:
    """By how much a metric may change between two models' answers to the same images by chance alone (95 %).

    Args:
        name: one of ours.
        before: the former answers, of all ranks.
        now: the new ones.

    Returns:
        None: that is not known of this metric.
    """
    value, num = _value_of(name), len(now.probabilities)
    if value is None or not num:
        return None
    draws = min(DRAWS, MOST_DRAWN // max(1, now.probabilities.numel()))
    weights = _draw(num, draws)
    gains = value(now, weights) - value(before, weights)
    gains = gains[gains.isfinite()]  # a draw without any image of some class has no AUROC of it
    return Z_95 * float(gains.std()) if len(gains) > 1 else None


def intervals(scores: Scores | None, *, wanted: bool = True) -> dict[str, list[float]]:
    """95 % intervals of metrics by their names, where images are few; those of answers to one class an image are known.

    Every rank must call it.

    Args:
        scores: of this rank.
        wanted: whether this rank does anything with them; else there are none.
    """
    if scores is None or not 0 < scores.samples * scores.probabilities.shape[1] <= MOST_DRAWN // DRAWS:
        return {}
    found = scores.gather()
    if not wanted:
        return {}
    weights = _draw(len(found.true), DRAWS)
    drawn = _ranked(found, weights)
    if scores.threshold is not None:
        of_answers = [name for name, metric in METRICS.items() if metric.of_answers and name != "top1"]
        drawn |= {name: _of_answers(name, found, weights) for name in of_answers}
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: values.nanquantile(bounds).tolist() for name, values in drawn.items() if values.isfinite().any()}


def _draw(num: int, draws: int) -> torch.Tensor:
    """How often each image is drawn: float64 D x N; the same at every call."""
    import numpy as np

    return torch.from_numpy(np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), size=draws)).double()


def _value_of(name: str) -> Callable[[Scores, torch.Tensor], torch.Tensor] | None:
    """What computes a metric of each draw: from the answers and how often each image was drawn (D x N)."""
    if name in ("top1", "top5"):
        return lambda scores, weights: _mean(scores.hits[:, int(name == "top5")].double(), weights)
    if name in ("auroc", "average_precision"):
        return lambda scores, weights: _ranked(scores, weights)[name]
    if name == "ece":
        return _calibration_error
    metric = METRICS.get(name)
    return (lambda scores, weights: _of_answers(name, scores, weights)) if metric and metric.of_answers else None


def _mean(of_images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return weights @ of_images / weights.sum(dim=1)


def _ranked(scores: Scores, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """AUROC and average precision, each the mean over the classes that have both kinds of images in a draw."""
    found = []
    for probabilities, true in zip(scores.probabilities.T, scores.true.T, strict=True):
        ordered, order = probabilities.sort(descending=True)
        ends = torch.ones_like(ordered, dtype=torch.bool)
        ends[:-1] = ordered[1:] != ordered[:-1]
        drawn, of_class = weights[:, order], true[order].double()
        right, wrong = ((drawn * kind).cumsum(dim=1)[:, ends].T for kind in (of_class, 1 - of_class))
        found.append(torch.stack(areas(right, wrong)))
    auroc, precision = torch.stack(found).masked_fill(~torch.stack(found).isfinite(), math.nan).nanmean(dim=0)
    return {"auroc": auroc, "average_precision": precision}


def _calibration_error(scores: Scores, weights: torch.Tensor) -> torch.Tensor:
    confidences, hits = scores.answered
    off = confidences.double().nan_to_num() - hits.double()
    of_bins = off.new_zeros(len(off), CALIBRATION_BINS).scatter_add_(1, calibration_bin(confidences), off)
    return (weights @ of_bins).abs().sum(dim=1) / (weights.sum(dim=1) * confidences.shape[1])


def _of_answers(name: str, scores: Scores, weights: torch.Tensor) -> torch.Tensor:
    """A metric of classes that were said and that are true."""
    threshold = scores.threshold
    if threshold is None:
        places = scores.probabilities.argmax(dim=1, keepdim=True)
        said = torch.zeros_like(scores.true).scatter_(1, places, value=True)
    else:
        said = scores.probabilities >= threshold
    parts = [(weights @ part.double()).tolist() for part in (said & scores.true, scores.true, said)]
    value = METRICS[name].value
    assert value  # noqa: S101
    found = [
        value(Counts(samples=len(scores.true), loss=0.0, top_k=0, hits=hits, true=true, predicted=predicted))
        for hits, true, predicted in zip(*parts, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)
