"""Says so where a best epoch beats the former best by no more than chance would make of so few images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.distributed import count_over_ranks, sum_over_ranks
from launcher.engine.validating import redraw
from launcher.recipe.metrics import METRICS
from launcher.report.intervals import MOST_IMAGES, Z_95, noise_of_gain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.engine.listeners.recorder import Recorder
    from launcher.engine.validating.redraw import Scores
    from launcher.engine.validating.several import SeveralAnswers
    from launcher.recipe.metrics import Metric


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a rank's validation images were answered, image by image."""

    share: Any
    """What decides which images these are, and in which order."""
    samples: int
    """Images of all ranks."""
    num_classes: int
    """Outputs of the model."""
    pairs: torch.Tensor
    """Of each image, true class * number of classes + predicted class; int64."""
    losses: torch.Tensor | None
    """Of each image, float64; None: the loss gives means of batches only."""
    confidences: torch.Tensor | None = None
    """Of each image, the probability of what it was answered, float32."""
    calibration: Sequence[Sequence[float]] = ()
    """Of each bin of confidence, over all ranks: images (with any number of classes: their classes), the sum of their
    confidences, and those that are right."""
    curves: torch.Tensor | None = None
    """Of each class, over all ranks, the precision at even recalls (:mod:`launcher.engine.validating.ranking`)."""
    roc: torch.Tensor | None = None
    """Likewise the recall at even false positive rates."""
    several: SeveralAnswers | None = None
    """Where an image has any number of classes."""
    scores: Scores | None = None
    """The probabilities; None: there are too many to keep."""


class Noise:
    """Compares each best epoch with the one before it, image by image. Every rank has one.

    After a resume there is nothing to compare the next best epoch with.

    Args:
        recorder: on rank 0.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._former: Answers | None = None

    def judge(self, former: dict[str, Any] | None, best: dict[str, Any], answers: Answers | None) -> None:
        """Take the best epoch's answers, and tell where they beat those of ``former`` by chance, it may be.

        Args:
            former: the best value before, as status.json has it.
            best: that of now.
            answers: of the weights that it is the value of; None: they are not kept.
        """
        before, self._former = self._former, answers
        if not former or not before or not answers or before.share != answers.share:
            return
        name = best["metric"].removeprefix("val/")
        wanted = self._recorder is not None
        noise = _noise(name, before, answers, wanted=wanted) if answers.samples <= MOST_IMAGES else None
        gain = abs(best["value"] - former["value"])
        if self._recorder is None or noise is None or gain >= noise:
            return
        told = {key: best[key] for key in ("epoch", "step", "metric", "value")}
        fields = {"former": former["value"], "former_epoch": former["epoch"], "gain": gain, "noise": noise}
        self._recorder.event("best_within_noise", **told, **fields, samples=answers.samples)
        self._recorder.say(
            f"epoch {best['epoch'] + 1}: {best['metric']} {best['value']:.4f} is the best so far, but no better than "
            f"the {former['value']:.4f} of epoch {former['epoch'] + 1} by more than chance: on {answers.samples} "
            f"images up to {noise:.4f} is noise (95 %)"
        )


def _noise(name: str, before: Answers, now: Answers, *, wanted: bool) -> float | None:
    """The largest gain that is noise; None: it is not known, or not wanted on this rank. Every rank must call it."""
    if name == "loss":
        lost = None if before.losses is None or now.losses is None else now.losses - before.losses
        return None if lost is None else _of_differences(lost)
    metric = METRICS.get(name)
    if metric is None:  # of the user's own
        return None
    if metric.of_answers and now.num_classes:
        return _of_answers(metric, name, before, now, wanted=wanted)
    both = before.scores and now.scores and (before.scores.gather(), now.scores.gather())
    return redraw.noise_of_gain(name, *both) if both and wanted else None


def _of_answers(metric: Metric, name: str, before: Answers, now: Answers, *, wanted: bool) -> float | None:
    """Of a metric that follows from the one answer to each image."""
    num = now.num_classes
    true, old, new = now.pairs // num, before.pairs % num, now.pairs % num
    if name == "top1":
        return _of_differences((new == true).double() - (old == true).double())
    if num > redraw.MOST_CLASSES:
        return None
    kinds, counts = (found.cpu().numpy() for found in count_over_ranks((true * num + old) * num + new))
    if not wanted:
        return None
    return noise_of_gain(metric, kinds // num**2, kinds // num % num, kinds % num, counts)


def _of_differences(differences: torch.Tensor) -> float:
    """Of a mean of differences image by image; for hits this is McNemar's test."""
    squares, num = sum_over_ranks(
        torch.stack([differences.square().sum(), differences.new_tensor(float(len(differences)))])
    ).tolist()
    return float(Z_95 * math.sqrt(squares) / num)
