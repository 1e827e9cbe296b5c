"""What is counted in training and validation: integers over real samples, so that any world size agrees on them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.engine.distributed import sum_over_ranks
from launcher.recipe import TOP_K

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DETAILED_CLASSES = 100


class TrainTotals:
    """Running sums of a rank over some steps; they stay on the device, so that adding to them never waits for it."""

    def __init__(self, device: torch.device) -> None:
        # loss, top-1 and top-5 hits, samples; float64 holds counts exactly up to 2**53.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: the sum of its losses (scalar), its logits (N x C) and labels (int64 N).

        A batch whose loss is no number is not counted; its step is left out (:mod:`launcher.engine.non_finite`).
        """
        if not len(labels):
            return
        hits = _hits(logits, labels)
        counts = torch.stack([loss_sum.double(), hits[:, 0].sum(), hits.sum(), hits.new_full((), len(labels))])
        self._sums += counts.where(loss_sum.isfinite(), 0.0)

    def restore(self, sums: Sequence[float]) -> None:
        """Go on from sums over all ranks, which one rank takes over."""
        self._sums += torch.tensor(sums, dtype=torch.float64, device=self._sums.device)

    def reduce(self) -> tuple[float, ...]:
        """Sums over all ranks: (loss, top-1 hits, top-5 hits, samples). Waits for the device."""
        return tuple(sum_over_ranks(self._sums.clone()).tolist())

    def reset(self) -> None:
        """Start again from nothing."""
        self._sums.zero_()


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
    """Counts of a rank over its share of the validation set, by torchmetrics; all ranks' together on :meth:`compute`.

    Args:
        classes: names, in the order of the logits.
        device: where logits will be.
    """

    def __init__(self, classes: Sequence[str], device: torch.device) -> None:
        # Imported at the first validation: it takes a second that the first step need not wait for.
        from torchmetrics import MetricCollection, SumMetric
        from torchmetrics.classification import (
            MulticlassAccuracy,
            MulticlassConfusionMatrix,
            MulticlassF1Score,
        )

        num = len(classes)
        self._classes = list(classes)
        self._counts = MetricCollection(
            {
                "top1": MulticlassAccuracy(num, average="micro"),
                "top5": MulticlassAccuracy(num, average="micro", top_k=min(TOP_K, num)),
                "f1": MulticlassF1Score(num, average="macro"),
                "confusion": MulticlassConfusionMatrix(num),
            },
            compute_groups=False,
        ).to(device)
        # "disable" lets a loss that is no number be seen; by default torchmetrics leaves it out of the sum.
        self._loss = SumMetric(nan_strategy="disable").to(device).set_dtype(torch.float64)

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch of logits (N x C) and labels (int64 N)."""
        self._loss.update(nn.functional.cross_entropy(logits.float(), labels, reduction="sum").double())
        self._counts.update(logits, labels)

    def compute(self) -> dict[str, Any]:
        """``{samples, loss, top1, top5, f1}`` of all ranks.

        Up to 100 classes with ``per_class`` and ``confusion``, beyond with ``answers`` (:func:`answers`).
        """
        values = self._counts.compute()
        confusion = values.pop("confusion").cpu()
        samples = int(confusion.sum())
        result: dict[str, Any] = {"samples": samples, "loss": float(self._loss.compute()) / samples}
        result |= {name: float(values[name]) for name in ("top1", "top5", "f1")}
        result["top1"] = int(confusion.diag().sum()) / samples
        if len(self._classes) <= MAX_DETAILED_CLASSES:
            result |= {"per_class": per_class(confusion, self._classes), "confusion": confusion.tolist()}
        else:
            result["answers"] = answers(confusion.diag(), confusion.sum(1), confusion.sum(0), self._classes)
        return result


def answers(hits: torch.Tensor, true: torch.Tensor, predicted: torch.Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """What :mod:`launcher.findings` needs where there are too many classes for their confusion matrix.

    Args:
        hits: images of each class that are predicted so (int64 C).
        true: images of each class.
        predicted: images that are predicted to be of each class.
        classes: names.

    Returns:
        ``chance``: top-1 of these answers, had they been given at random; ``most``: the class that is predicted most
        often, ``count``: how often, ``true``: how many images are of it, ``hits``: of these, those predicted so.
    """
    most = int(predicted.argmax())
    chance = float((true.double() * predicted.double()).sum() / true.sum().double() ** 2)
    counts = {"count": int(predicted[most]), "true": int(true[most]), "hits": int(hits[most])}
    return {"chance": chance, "most": classes[most], **counts}


def per_class(confusion: torch.Tensor, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Recall, precision, F1 (fractions) and samples of each class from a confusion matrix (rows true, int64 C x C)."""
    result = {}
    for index, name in enumerate(classes):
        hits, true, predicted = (
            int(n) for n in (confusion[index, index], confusion[index].sum(), confusion[:, index].sum())
        )
        result[name] = {
            "recall": hits / true if true else 0.0,
            "precision": hits / predicted if predicted else 0.0,
            "f1": 2 * hits / (true + predicted) if true + predicted else 0.0,
            "samples": true,
        }
    return result


class BestMetric:
    """The watched metric's best value so far, and for how many epochs there was no better one (early stopping).

    Args:
        metric: as in ``val/loss``.
        mode: min or max.
        min_delta: how much better counts as better, in the metric's own unit.
        patience: epochs without a better value after which :attr:`exhausted` is true; None: never.
    """

    def __init__(self, *, metric: str, mode: str, min_delta: float, patience: int | None) -> None:
        self.metric = metric
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
        """Take an epoch's value; return whether it is the best so far. NaN never is."""
        if (self.best is None and not math.isnan(value)) or (
            self.best is not None and self._sign * (value - self.best["value"]) > self._min_delta
        ):
            self.best = {"metric": self.metric, "value": value, "epoch": epoch, "step": step}
            self.waited = 0
            return True
        self.waited += 1
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.best, self.waited = state["best"], state["waited"]
