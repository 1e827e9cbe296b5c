"""The moving average of the weights (``train.ema``), which often validates better than the weights themselves.

It is updated after each step by a factor that follows from the step alone, stays on the device, and nobody waits for
it. Every rank has the same one, since every rank has the same weights.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

PREFIX = "ema_"
"""What the names of metrics that the average is measured by begin with."""
WEIGHTS = "ema"
"""What the best value's ``weights`` says where it is the average's."""


def decay_at(step: int, decay: float) -> float:
    """How much of the average stays in the update after ``step`` others: less in the beginning, as in TensorFlow."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """Of one model; without a decay it does nothing.

    Args:
        module: the model, on its device.
        decay: ``train.ema``; None: there is no average.
    """

    def __init__(self, module: nn.Module, decay: float | None) -> None:
        self._module = module
        self._decay = decay
        self._weights: dict[str, torch.Tensor] = {}
        """The average, by the names of the parameters; empty until the first step."""
        self._buffers: dict[str, torch.Tensor] = {}
        """Those that it was last validated with; empty until then: the model's own."""
        self._apart: set[str] = set()
        """Parameters whose average may differ from them: what has learned, also where it does no more."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step that had ``step`` others before it."""
        if self._decay is None:
            return
        if not self._weights:
            self._weights = {name: p.detach().clone() for name, p in self._module.named_parameters()}
            return
        own = dict(self._module.named_parameters())
        self._apart.update(name for name, parameter in own.items() if parameter.requires_grad)
        following = [name for name in own if name in self._apart]
        averages, weights = ([of[name] for name in following] for of in (self._weights, own))
        torch._foreach_lerp_(averages, weights, 1.0 - decay_at(step, self._decay))

    def beside(self, recompute: Callable[[], None], validate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``validate`` gives for the weights, and what it gives for the average as ``ema_NAME``.

        Args:
            recompute: makes BatchNorm's statistics those of the weights, where they are not yet; else the average is
                validated with those of the weights.
            validate: gives the values of all metrics.
        """
        recompute()
        values = validate()
        if not self._weights:
            return values
        with self._in_place():
            recompute()
            of_average = validate()
        return values | {f"{PREFIX}{name}": value for name, value in of_average.items() if name != "samples"}

    @torch.no_grad()
    def saved(self) -> dict[str, torch.Tensor] | None:
        """What a checkpoint keeps: a whole state of the model; None: there is no average."""
        if not self._weights:
            return None
        return self._module.state_dict() | self._buffers | self._weights

    @torch.no_grad()
    def restore(self, saved: dict[str, torch.Tensor] | None) -> None:
        """Go on from :meth:`saved`; of a run that had none the average begins with the next step."""
        self._weights, self._buffers, self._apart = {}, {}, set()
        if self._decay is None or saved is None:
            return
        state = self._module.state_dict()
        tensors = {name: torch.empty_like(state[name]).copy_(value) for name, value in saved.items() if name in state}
        names = {name for name, _ in self._module.named_parameters()}
        self._apart = {name for name in names & tensors.keys() if not torch.equal(tensors[name], state[name])}
        self._weights = {name: value for name, value in tensors.items() if name in names}
        self._buffers = {name: value for name, value in tensors.items() if name not in names}

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """Have the model compute with the average; it keeps the buffers that it ends with."""
        buffers = dict(self._module.named_buffers())
        kept = {name: buffer.clone() for name, buffer in buffers.items()}
        self._swap()
        try:
            yield
            self._buffers = {name: buffer.clone() for name, buffer in buffers.items()}
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
