"""What is counted in validation: whole numbers over real images, so that any world size agrees on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.distributed import any_rank, count_over_ranks, sum_over_ranks
from launcher.engine.metrics import hits_of
from launcher.engine.validating.noise import Answers
from launcher.engine.validating.ranking import Calibration, Ranking, error_of, in_images, mean_of
from launcher.engine.validating.redraw import scores_of
from launcher.recipe.metrics import METRICS, Counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.engine.losses import Loss
    from launcher.engine.user.metrics import UserMetrics

MAX_DETAILED_CLASSES = 100
NUM_MISTAKES = 10


class ValidationTotals:
    """Counts of a rank over its share of the validation set; all ranks' together on :meth:`compute`.

    Integers of single classes, and the pairs of true and predicted class that occur: time and memory grow with images
    plus classes. (A confusion matrix, and torchmetrics' F1, which makes one, grow with the square of the classes.)

    Args:
        classes: names, in the order of the logits.
        device: where logits will be.
        loss: of the run.
        own: the recipe's own metrics.
    """

    def __init__(
        self, classes: Sequence[str], device: torch.device, loss: Loss, own: UserMetrics | None = None
    ) -> None:
        self._classes = list(classes)
        self._of_run = loss
        self._gives_means = False
        """Whether the loss does on any rank, which one without images cannot see; known after :meth:`compute`."""
        self._own = own
        if own:
            own.reset()  # a validation that was broken off left something
        self._losses = [torch.empty(0, dtype=torch.float64, device=device)]
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._top_k = torch.zeros((), dtype=torch.int64, device=device)
        self._pairs = [torch.empty(0, dtype=torch.int64, device=device)]
        """Of each image, true class * number of classes + predicted class."""
        self._confidences = [torch.empty(0, device=device)]
        self._hits: list[torch.Tensor] = []
        """Of each batch, whether its images are right; bool N x 2."""
        self._ranking = Ranking(len(self._classes), device)
        self._calibration = Calibration(device)
        self._bins: list[list[int]] = []

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch of logits (N x C) and labels (int64 N)."""
        losses = self._of_run.each(logits, labels)
        self._losses.append(losses)
        self._loss += losses.sum()
        hits = hits_of(logits, labels)
        self._hits.append(hits.bool())
        self._top_k += hits[:, 1].sum().long()
        predicted = logits.argmax(dim=1)
        self._pairs.append(labels * len(self._classes) + predicted)
        probabilities = self._of_run.probabilities(logits)
        self._ranking.add(probabilities, labels)
        confidences = probabilities.gather(1, predicted[:, None])[:, 0]
        self._confidences.append(confidences)
        self._calibration.add(confidences, predicted == labels)
        if self._own:
            self._own.add(logits, labels)

    def answers(self, share: Any, samples: int) -> Answers:
        """What this rank's images were answered.

        Args:
            share: what decides which images these are.
            samples: those of all ranks.
        """
        return Answers(
            share=share,
            samples=samples,
            num_classes=len(self._classes),
            pairs=torch.cat(self._pairs),
            losses=None if self._gives_means else torch.cat(self._losses),
            confidences=torch.cat(self._confidences),
            calibration=in_images(self._bins),
            curves=self._ranking.curves,
            roc=self._ranking.roc,
            scores=scores_of(self._ranking, self._hits, samples),
        )

    def compute(self) -> dict[str, Any]:
        """``samples`` of all ranks, and the value of every metric; ``ranking``: how AUROC was computed.

        Up to 100 classes with ``per_class`` and ``confusion`` (rows true, columns predicted), beyond with ``mistakes``,
        the most frequent confusions, and ``answers`` (:func:`answers`).
        """
        self._gives_means = any_rank(self._of_run.gives_means, self._loss.device)
        loss, top_k = float(sum_over_ranks(self._loss.clone())), int(sum_over_ranks(self._top_k.clone()))
        pairs, counts = (found.cpu() for found in count_over_ranks(torch.cat(self._pairs)))
        num, samples = len(self._classes), int(counts.sum())
        true, predicted = pairs // num, pairs % num
        right = true == predicted
        totals = ClassTotals(
            hits=_sum_by(true[right], counts[right], num),
            true=_sum_by(true, counts, num),
            predicted=_sum_by(predicted, counts, num),
        )
        ranking, auroc, precision = self._ranking.compute()
        self._bins = self._calibration.bins()
        scores = {"auroc": mean_of(auroc), "average_precision": mean_of(precision), "ece": error_of(self._bins)}
        result: dict[str, Any] = {"samples": samples, **values_of(totals, samples, loss, top_k, scores)}
        result |= self._own.compute() if self._own else {}
        result["ranking"] = ranking
        if num > MAX_DETAILED_CLASSES:
            mistakes = self._mistakes(true[~right], predicted[~right], counts[~right])
            return result | {"mistakes": mistakes, "answers": answers(totals, self._classes)}
        confusion = _sum_by(pairs, counts, num * num).view(num, num).tolist()
        return result | {"per_class": per_class(totals, self._classes), "confusion": confusion}

    def _mistakes(self, true: torch.Tensor, predicted: torch.Tensor, counts: torch.Tensor) -> list[dict[str, Any]]:
        """The most frequent, of pairs in their order."""
        most = counts.argsort(descending=True, stable=True)[:NUM_MISTAKES]
        rows = zip(true[most].tolist(), predicted[most].tolist(), counts[most].tolist(), strict=True)
        return [{"true": self._classes[t], "predicted": self._classes[p], "count": count} for t, p, count in rows]


def values_of(
    totals: ClassTotals,
    samples: int,
    loss: float,
    top_k: int,
    scores: Mapping[str, float],
    *,
    first: int | None = None,
) -> dict[str, float]:
    """The value of every metric of ours, from what was counted."""
    counted = Counts(
        samples=samples,
        loss=loss,
        top_k=top_k,
        hits=totals.hits.tolist(),
        true=totals.true.tolist(),
        predicted=totals.predicted.tolist(),
        scores=scores,
        first=first,
    )
    return {name: float(metric.value(counted)) for name, metric in METRICS.items() if metric.value}


def _sum_by(places: torch.Tensor, counts: torch.Tensor, num: int) -> torch.Tensor:
    """Counts (int64) added up by their place of ``num``."""
    return torch.zeros(num, dtype=torch.int64).index_add_(0, places, counts)


@dataclass(frozen=True, kw_only=True)
class ClassTotals:
    """Images of each class, int64 C."""

    hits: torch.Tensor
    """Predicted rightly."""
    true: torch.Tensor
    """Of the class."""
    predicted: torch.Tensor
    """Taken for the class."""


def answers(totals: ClassTotals, classes: Sequence[str]) -> dict[str, Any]:
    """What :mod:`launcher.runs.findings` needs where there are too many classes for their confusion matrix.

    Returns:
        ``chance``: top-1 of these answers, had they been given at random; ``most``: the class that is predicted most
        often, ``count``: how often, ``true``: how many images are of it, ``hits``: of these, those predicted so.
    """
    most = int(totals.predicted.argmax())
    chance = float((totals.true.double() * totals.predicted.double()).sum() / totals.true.sum().double() ** 2)
    counts = {name: int(found[most]) for name, found in (("count", totals.predicted), ("true", totals.true))}
    return {"chance": chance, "most": classes[most], **counts, "hits": int(totals.hits[most])}


def per_class(totals: ClassTotals, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Recall, precision, F1 (fractions) and samples of each class."""
    rows = zip(classes, totals.hits.tolist(), totals.true.tolist(), totals.predicted.tolist(), strict=True)
    return {
        name: {
            "recall": hits / true if true else 0.0,
            "precision": hits / predicted if predicted else 0.0,
            "f1": 2 * hits / (true + predicted) if true + predicted else 0.0,
            "samples": true,
        }
        for name, hits, true, predicted in rows
    }
