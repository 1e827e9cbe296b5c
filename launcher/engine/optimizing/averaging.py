"""The average of the weights (``train.ema``, ``train.swa``), which often validates better than the weights themselves.

It is updated after each step by a factor that follows from the step alone, stays on the device, and nobody waits for
it. Every rank has the same one, since every rank has the same weights. BatchNorm's running statistics are averaged as
the weights are: those of the last few steps belong to other weights. (Of these each rank has its own; those of rank 0
count, in validation and in a checkpoint.)
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.layers import BatchNorm
from launcher.recipe.run_weights import AVERAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

EMA, SWA = AVERAGES


def decay_at(step: int, decay: float) -> float:
    """How much of the average stays in the update after ``step`` others: less in the beginning, as in TensorFlow.

    So it spans no more than the last ninth or so of the steps done, however near to 1 ``decay`` is.
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """Of one model; without a decay and an epoch it does nothing.

    Args:
        module: the model, on its device.
        decay: ``train.ema``; None: there is no moving average.
        after: ``train.swa``, epochs after which the mean over all further steps begins; None: there is none.
    """

    def __init__(self, module: nn.Module, decay: float | None, after: int | None = None) -> None:
        self._module = module
        self._norms = {name: layer for name, layer in module.named_modules() if isinstance(layer, BatchNorm)}
        self._decay = decay
        self._after = after
        self.kind = EMA if decay is not None else SWA if after is not None else None
        """What names of metrics begin with that it is measured by, and what the best value's ``weights`` says; None:
        there is no average."""
        self.num = 0
        """With ``train.swa`` the steps that it is the mean of."""
        self._weights: dict[str, torch.Tensor] = {}
        """The average, by the names of the parameters; empty until the first step."""
        self._buffers: dict[str, torch.Tensor] = {}
        """That of BatchNorm's running statistics."""
        self._apart: set[str] = set()
        """Parameters whose average may differ from them: what has learned, also where it does no more."""

    @torch.no_grad()
    def update(self, step: int, epoch: int = 0) -> None:
        """Take in the weights after a step of ``epoch`` (from 0) that had ``step`` others before it."""
        if self.kind is None or epoch < (self._after or 0):
            return
        own = dict(self._module.named_parameters())
        if not self._weights:
            self._weights, self._buffers = _copied(own), _copied(self._statistics())
            self.num = int(self._decay is None)
            return
        share = 1.0 / (self.num + 1) if self._decay is None else 1.0 - decay_at(step, self._decay)
        self._apart.update(name for name, parameter in own.items() if parameter.requires_grad)
        _lerp(self._weights, own, [name for name in own if name in self._apart], share)
        statistics = self._statistics()
        _lerp(self._buffers, statistics, [*statistics], share)
        self.num += self._decay is None

    def beside(self, recompute: Callable[..., None], validate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``validate`` gives for the weights, and what it gives for the average as ``ema_NAME`` or ``swa_NAME``.

        Args:
            recompute: makes BatchNorm's statistics those of the weights, where they are not yet, or, with
                ``of_mean=True``, where the recipe does not forbid it: the mean of far apart weights has statistics that
                are the mean of none.
            validate: gives the values of all metrics.
        """
        recompute()
        values = validate()
        if not self._weights:
            return values
        with self._in_place():
            recompute(of_mean=self.kind == SWA)
            of_average = validate()
        return values | {
            f"{self.kind}_{name}": value for name, value in of_average.items() if name not in ("samples", "examples")
        }

    @torch.no_grad()
    def saved(self) -> dict[str, torch.Tensor] | None:
        """What a checkpoint keeps, with :attr:`num`: a whole state of the model; None: there is no average."""
        if not self._weights:
            return None
        return self._module.state_dict() | self._buffers | self._weights

    @torch.no_grad()
    def restore(self, saved: dict[str, torch.Tensor] | None, num: int = 0, epoch: int = 0) -> None:
        """Go on from :meth:`saved`; a run that had none, or no mean, begins it with the next step that is in it.

        Args:
            saved: an average of this model's.
            num: the steps that it is the mean of; 0: it is a moving average.
            epoch: from 0, of the next step; a mean that begins after it by the recipe of now is not gone on with.
        """
        self._weights, self._buffers, self._apart, self.num = {}, {}, set(), 0
        if saved is None or self.kind is None or (self.kind == SWA and (not num or epoch < (self._after or 0))):
            return
        own, statistics = dict(self._module.named_parameters()), self._statistics()
        tensors = {name: torch.empty_like(like).copy_(saved[name]) for name, like in (own | statistics).items()}
        self._apart = {name for name, parameter in own.items() if not torch.equal(tensors[name], parameter)}
        self._weights = {name: tensors[name] for name in own}
        self._buffers = {name: tensors[name] for name in statistics}
        self.num = num if self.kind == SWA else 0

    def _statistics(self) -> dict[str, torch.Tensor]:
        """BatchNorm's running means and variances."""
        return {
            f"{layer}.{name}".removeprefix("."): buffer
            for layer, norm in self._norms.items()
            for name, buffer in norm.named_buffers(recurse=False)
            if buffer.is_floating_point()
        }

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """Have the model compute with the average; it keeps the statistics that it ends with."""
        buffers = dict(self._module.named_buffers())
        kept = _copied(buffers)
        self._swap()
        for name, statistic in self._statistics().items():
            statistic.copy_(self._buffers[name])
        try:
            yield
            self._buffers = _copied(self._statistics())
        finally:  # also where all agree to stop in the middle
            self._swap()
            for name, buffer in buffers.items():
                buffer.copy_(kept[name])

    @torch.no_grad()
    def _swap(self) -> None:
        """The tensors stay where they are: optimizer, DDP and compiled code know them."""
        for name, parameter in self._module.named_parameters():
            average = self._weights[name]
            before = parameter.clone()
            parameter.copy_(average)
            average.copy_(before)


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _lerp(of: Mapping[str, torch.Tensor], to: Mapping[str, torch.Tensor], names: Sequence[str], share: float) -> None:
    """Move what is named by a share of the way to other values."""
    if names:
        torch._foreach_lerp_([of[name] for name in names], [to[name] for name in names], share)
