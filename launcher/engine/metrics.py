"""What is counted in training and validation: integers over real samples, so that any world size agrees on them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from launcher.engine.distributed import max_over_ranks, sum_over_ranks
from launcher.engine.optimizing.averaging import PREFIX, WEIGHTS
from launcher.recipe.metrics import METRICS, TOP_K, Counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.engine.augmenting.mixing import Mix
    from launcher.engine.losses import Loss
    from launcher.engine.setup import Parts
    from launcher.engine.user.metrics import UserMetrics

MAX_DETAILED_CLASSES = 100
NUM_MISTAKES = 10


class TrainTotals:
    """Running sums of a rank over some steps; they stay on the device, so that adding to them never waits for it."""

    def __init__(self, device: torch.device) -> None:
        # loss, top-1 and top-5 hits, samples; float64 holds counts exactly up to 2**53.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, counts: torch.Tensor) -> None:
        """Add what :func:`count` gave of a batch."""
        self._sums += counts

    def restore(self, sums: Sequence[float]) -> None:
        """Go on from sums over all ranks, which one rank takes over."""
        self._sums += torch.tensor(sums, dtype=torch.float64, device=self._sums.device)

    def over_ranks(self) -> torch.Tensor:
        """Sums over all ranks: loss, top-1 hits, top-5 hits, samples; float64, on the device."""
        return sum_over_ranks(self._sums.clone())

    def reduce(self) -> tuple[float, ...]:
        """The same as numbers. Waits for the device."""
        return tuple(self.over_ranks().tolist())

    def reset(self) -> None:
        """Start again from nothing."""
        self._sums.zero_()


def count(loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, mix: Mix | None = None) -> torch.Tensor:
    """Of a batch, what :class:`TrainTotals` add up: from the sum of its losses, logits (N x C) and labels (int64 N).

    Of an image that is mixed of two, each of their classes is right by its share.
    A batch whose loss is NaN or infinite is not counted; its step is left out (:mod:`launcher.engine.non_finite`).
    """
    hits = mix.mean(functools.partial(_hits, logits), labels) if mix else _hits(logits, labels)
    counts = torch.stack([loss_sum.double(), hits[:, 0].sum(), hits.sum(), hits.new_full((), len(labels))])
    # With a number in its place torch.where would copy that to the GPU, and wait for it.
    return counts.masked_fill(loss_sum.isfinite().logical_not(), 0.0)


def means(sums: Sequence[float]) -> dict[str, Any]:
    """Sums as :meth:`TrainTotals.reduce` gives them, as ``{samples, loss, top1, top5}``."""
    loss, top1, top5, samples = sums
    num = max(1.0, samples)
    return {"samples": int(samples), "loss": loss / num, "top1": top1 / num, "top5": top5 / num}


def _hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Float64 N x k: in column j, 1 where the label is the class of rank j."""
    top = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).double()


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
        self._own = own
        if own:
            own.reset()  # a validation that was broken off left something
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._top_k = torch.zeros((), dtype=torch.int64, device=device)
        self._pairs = [torch.empty(0, dtype=torch.int64, device=device)]
        """Of each image, true class * number of classes + predicted class."""

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch of logits (N x C) and labels (int64 N)."""
        self._loss += self._of_run.sum(logits, labels, training=False)
        self._top_k += _hits(logits, labels).sum().long()
        self._pairs.append(labels * len(self._classes) + logits.argmax(dim=1))
        if self._own:
            self._own.add(logits, labels)

    def compute(self) -> dict[str, Any]:
        """``samples`` of all ranks, and the value of every metric.

        Up to 100 classes with ``per_class`` and ``confusion`` (rows true, columns predicted), beyond with ``mistakes``,
        the most frequent confusions, and ``answers`` (:func:`answers`).
        """
        loss, top_k = float(sum_over_ranks(self._loss.clone())), int(sum_over_ranks(self._top_k.clone()))
        pairs, counts = (found.cpu() for found in _count_over_ranks(torch.cat(self._pairs)))
        num, samples = len(self._classes), int(counts.sum())
        true, predicted = pairs // num, pairs % num
        right = true == predicted
        totals = ClassTotals(
            hits=_sum_by(true[right], counts[right], num),
            true=_sum_by(true, counts, num),
            predicted=_sum_by(predicted, counts, num),
        )
        counted = Counts(
            samples=samples,
            loss=loss,
            top_k=top_k,
            hits=totals.hits.tolist(),
            true=totals.true.tolist(),
            predicted=totals.predicted.tolist(),
        )
        result: dict[str, Any] = {"samples": samples}
        result |= {name: float(metric.value(counted)) for name, metric in METRICS.items() if metric.value}
        result |= self._own.compute() if self._own else {}
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


def _count_over_ranks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values (int64, not negative) of all ranks that occur, ascending, and how often each does."""
    own, counts = torch.unique(values, return_counts=True)
    longest = int(max_over_ranks(torch.tensor(len(own), device=own.device)))
    padded = torch.stack([nn.functional.pad(each, (0, longest - len(own))) for each in (own, counts)])
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, padded)
    every, times = torch.cat(gathered, dim=1)
    every, times = every[times > 0], times[times > 0]
    found, places = torch.unique(every, return_inverse=True)
    return found, torch.zeros_like(found).index_add_(0, places, times)


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


class BestMetric:
    """The watched metric's best value so far, and for how many epochs there was no better one (early stopping).

    Args:
        metric: as in ``val/loss``.
        mode: min or max.
        min_delta: how much better counts as better, in the metric's own unit.
        patience: epochs without a better value after which :attr:`exhausted` is true; None: never.
        measure: what the values are measured by, where that can change.
    """

    def __init__(
        self, *, metric: str, mode: str, min_delta: float, patience: int | None, measure: str | None = None
    ) -> None:
        self.metric = metric
        self._measure = measure
        self._sign = 1.0 if mode == "max" else -1.0
        self._min_delta = min_delta
        self._patience = patience
        self.best: dict[str, Any] | None = None
        self.waited = 0

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop."""
        return self._patience is not None and self.waited >= self._patience

    def update(self, value: float, *, epoch: int, step: int) -> bool:
        """Take an epoch's value; return whether it is the best so far. NaN and infinity never are."""
        if math.isfinite(value) and (self.best is None or self._sign * (value - self.best["value"]) > self._min_delta):
            self.best = {"metric": self.metric, "value": value, "epoch": epoch, "step": step}
            self.waited = 0
            return True
        self.waited += 1
        return False

    def take(self, values: Mapping[str, float], *, epoch: int, step: int) -> bool:
        """Take an epoch's values by their names: that of the weights, or of their average where that is better."""
        own, average = values[self.metric], values.get(self.metric.replace("/", f"/{PREFIX}", 1), math.nan)
        is_better = math.isfinite(average) and not self._sign * (average - own) <= 0
        is_best = self.update(average if is_better else own, epoch=epoch, step=step)
        if is_best and is_better and self.best:
            self.best["weights"] = WEIGHTS
        return is_best

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "waited": self.waited, "measure": self._measure}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; a best value of another metric or loss says nothing about this one's."""
        is_same = state.get("measure", self._measure) == self._measure
        if is_same and (state["best"] is None or state["best"]["metric"] == self.metric):
            self.best, self.waited = state["best"], state["waited"]
        else:
            self.best, self.waited = None, 0


def build_user_metrics(parts: Parts) -> UserMetrics | None:
    """The recipe's own metrics; torchmetrics, which takes a second, is imported only where there are some."""
    if not parts.recipe.metrics:
        return None
    from launcher.engine.user.metrics import UserMetrics

    return UserMetrics(parts.recipe, num_classes=len(parts.classes), device=parts.device.torch_device)
