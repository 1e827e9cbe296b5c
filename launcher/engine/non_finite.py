"""Finds NaN and infinite values: in weights, and in the loss or gradient of a step.

Every rank finds the same steps, and no step waits for the device.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.distributed import max_over_ranks
from launcher.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from launcher.engine.device import Device

CURE = "lower optim.lr or its groups, or lengthen optim.warmup_epochs, and start again"
MAX_IN_A_ROW = 10
"""Give up after so many steps in a row that were left out."""
LAG = 2
"""How many steps later a flag is read. By then the device has long computed it, and no rank reads it earlier or later
than another."""
MAX_OVERFLOWS = 25
"""Steps in a row that loss scaling may leave out: each halves the scale, which comes from 2**16 to below 1 by then.
A value that is still NaN or infinite is so without scaling."""


@dataclass(frozen=True, kw_only=True)
class NonFiniteStep:
    """A step that was left out."""

    step: int
    """Optimizer steps before it."""
    samples: tuple[int, ...]
    """Indices of this rank's samples that may be the cause: those of its batches with such a loss; all, if only the
    gradient is NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class _Watched:
    step: int
    values: Callable[[], torch.Tensor]
    """The flag, whether the gradient is NaN or infinite, then the sum of losses of each of this rank's batches."""
    micro_batches: Sequence[Sequence[int]]


def non_finite_names(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinite values."""
    return [name for name, t in state.items() if t.is_floating_point() and not bool(t.isfinite().all())]


def report(found: NonFiniteStep, paths: Sequence[str], recorder: Any, *, policy: str, num_in_a_row: int) -> None:
    """Tell of a step that was left out; raise TrainingError where ``train.on_nan`` (``policy``) does not go on.

    Args:
        found: the step.
        paths: of this rank's images that may be the cause.
        recorder: rank 0's; None on the others.
        policy: of the recipe.
        num_in_a_row: how many steps were left out, up to this one.
    """
    number = found.step + 1
    if paths:
        with contextlib.suppress(OSError):  # a full disk
            print("\n  ".join([f"step {number}: loss or gradient is NaN or infinite; images of this rank:", *paths]))
    if recorder:
        recorder.event("non_finite", step=number, policy=policy)
        recorder.say(f"step {number}: the loss or its gradient is NaN or infinite; train.on_nan={policy}")
    if policy == "stop":
        raise TrainingError(
            f"the loss or its gradient is NaN or infinite in step {number}, which did not reach the "
            f"weights; each rank's log names its images; {CURE}; or train.on_nan=skip leaves such steps out"
        )
    if num_in_a_row >= MAX_IN_A_ROW:
        raise TrainingError(f"{MAX_IN_A_ROW} steps in a row up to {number} were not finite; {CURE}")


class NonFiniteMonitor:
    """Keeps the flags of the last steps until they are read.

    Gradients are the same on every rank once DDP has averaged them, and a loss that is NaN or infinite makes all of
    them so; each rank therefore finds the same flag by itself. Only under loss scaling, where a gradient may overflow
    now and then, do the ranks exchange whether it was the loss; gradients that overflow again and again count as well.

    Args:
        device: where the flags are computed.
        scaled: whether losses are scaled (fp16).
    """

    def __init__(self, device: Device, *, scaled: bool) -> None:
        self._device = device
        self._scaled = scaled
        self._watched: deque[_Watched] = deque()
        self.num_in_a_row = 0
        """Steps left out since the last one that was not."""
        self._num_overflows = 0
        """Steps in a row whose gradient, not the loss, was NaN or infinite; only with loss scaling."""

    def flag(self, gradient_norm: torch.Tensor, losses: Sequence[torch.Tensor]) -> torch.Tensor:
        """Float32, 1 where the step has to be left out, else 0; on the device, as fused optimizers take it.

        Args:
            gradient_norm: of all gradients, averaged over the ranks.
            losses: the sum over each of this rank's batches.
        """
        if self._scaled:
            finite = torch.stack([loss.isfinite() for loss in losses]).all()
            return max_over_ranks(finite.logical_not().float())
        return gradient_norm.isfinite().logical_not().float()

    def watch(
        self,
        step: int,
        flag: torch.Tensor,
        gradient_norm: torch.Tensor,
        losses: Sequence[torch.Tensor],
        micro_batches: Sequence[Sequence[int]],
    ) -> None:
        """Keep what :meth:`flag` gave for a step, of what, and what it was trained on."""
        overflow = gradient_norm.isfinite().logical_not().float()
        values = self._device.to_host_later(torch.stack([flag, overflow, *(loss.float() for loss in losses)]))
        self._watched.append(_Watched(step=step, values=values, micro_batches=micro_batches))

    def read(self, step: int | None = None) -> Iterator[NonFiniteStep]:
        """The steps that were left out, of those whose flags are due before ``step``; None: of all.

        Every rank must call it, at the same step.
        """
        while self._watched and (step is None or self._watched[0].step <= step - LAG):
            watched = self._watched.popleft()
            flag, overflow, *losses = watched.values().tolist()
            self._num_overflows = self._num_overflows + 1 if overflow and not flag else 0
            left_out = flag or self._num_overflows >= MAX_OVERFLOWS
            self.num_in_a_row = self.num_in_a_row + 1 if left_out else 0
            if left_out:
                pairs = list(zip(losses, watched.micro_batches, strict=True))
                guilty = [batch for loss, batch in pairs if not math.isfinite(loss)]
                some_loss = bool(max_over_ranks(torch.tensor(float(bool(guilty)))))
                samples = [index for batch in (guilty if some_loss else watched.micro_batches) for index in batch]
                yield NonFiniteStep(step=watched.step, samples=tuple(samples))

    def forget(self) -> None:
        """Drop what was not read: training goes back to before it."""
        self._watched.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; every flag has to be read before."""
        return {"num_in_a_row": self.num_in_a_row, "num_overflows": self._num_overflows}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.num_in_a_row, self._num_overflows = state["num_in_a_row"], state["num_overflows"]
