"""What is counted in training, and the best value so far."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.distributed import sum_over_ranks
from launcher.recipe.metrics import TOP_K
from launcher.recipe.run_weights import AVERAGES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.engine.augmenting.mixing import Mix


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

    def of_rank(self) -> torch.Tensor:
        """This rank's sums: loss, top-1 hits, top-5 hits, samples; float64, on the device."""
        return self._sums

    def over_ranks(self) -> torch.Tensor:
        """The sums over all ranks."""
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
    hits = mix.mean(functools.partial(hits_of, logits), labels) if mix else hits_of(logits, labels)
    counts = torch.stack([loss_sum.double(), *hits.sum(dim=0), hits.new_full((), len(labels))])
    # With a number in its place torch.where would copy that to the GPU, and wait for it.
    return counts.masked_fill(loss_sum.isfinite().logical_not(), 0.0)


def means(sums: Sequence[float]) -> dict[str, Any]:
    """Sums as :meth:`TrainTotals.reduce` gives them, as ``{samples, loss, top1, top5}``."""
    loss, top1, top5, samples = sums
    num = max(1.0, samples)
    return {"samples": int(samples), "loss": loss / num, "top1": top1 / num, "top5": top5 / num}


def hits_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Float64 N x 2: 1 where the likeliest class is right, and where one of the TOP_K likeliest is.

    Args:
        logits: N x C.
        labels: the true classes, int64 N, or which are true, N x C.
    """
    top = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices
    right = top == labels[:, None] if labels.dim() == 1 else labels.gather(1, top) > 0
    return torch.stack([right[:, 0], right.any(dim=1)], dim=1).double()


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
        own, names = values[self.metric], {kind: self.metric.replace("/", f"/{kind}_", 1) for kind in AVERAGES}
        kind, average = next(((kind, values[name]) for kind, name in names.items() if name in values), ("", math.nan))
        is_better = math.isfinite(average) and not self._sign * (average - own) <= 0
        is_best = self.update(average if is_better else own, epoch=epoch, step=step)
        if is_best and is_better and self.best:
            self.best["weights"] = kind
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
