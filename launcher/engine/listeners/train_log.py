"""Training's log: sums over the last steps of all ranks, which no step waits for."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine import optim
from launcher.engine.metrics import means

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.engine.listeners.listeners import Listeners
    from launcher.engine.listeners.recorder import Recorder
    from launcher.engine.loading.pace import Pace
    from launcher.engine.setup import Parts
    from launcher.engine.state import TrainingState

LAG = 2
"""On a GPU a window is read so many steps later. It has been computed by then, and the GPU never runs out of work."""


@dataclass(frozen=True, kw_only=True)
class _Window:
    epoch: int
    step: int
    offset: int
    rates: dict[str, float]
    pace: dict[str, float]
    numbers: Callable[[], torch.Tensor]
    """Waits for the device; float64: the sums of :class:`launcher.engine.metrics.TrainTotals`, the gradient's norm."""


class TrainLog:
    """Tells the listeners of a window's loss and speed, in the order of the windows.

    Args:
        parts: model, data, optimizer and who we are.
        state: of the training.
        pace: clocks of this rank.
        listeners: which are told.
        recorder: on rank 0; the others are not told.
    """

    def __init__(
        self, parts: Parts, state: TrainingState, pace: Pace, listeners: Listeners, recorder: Recorder | None
    ) -> None:
        self._parts = parts
        self._state = state
        self._pace = pace
        self._listeners = listeners
        self._recorder = recorder
        self._windows: deque[_Window] = deque()

    def end_window(self, gradient_norm: torch.Tensor) -> None:
        """A window ends with the step that was just taken. Every rank must call it.

        Args:
            gradient_norm: of that step, on the device.
        """
        state, parts = self._state, self._parts
        sums = state.window_totals.over_ranks()
        state.window_totals.reset()
        pace, rates = self._pace.window(), optim.rates(parts.optimizer)
        if not self._recorder:
            return
        numbers = torch.cat([sums, gradient_norm.double().reshape(1)])
        window = _Window(
            epoch=state.epoch,
            step=state.step,
            offset=state.offset,
            rates=rates,
            pace=pace,
            numbers=parts.device.to_host_later(numbers),
        )
        self._windows.append(window)
        if not parts.device.runs_ahead:
            self.tell()

    def tell(self, step: int | None = None) -> None:
        """Tell of the windows that are due before ``step``; None: of all."""
        while self._windows and (step is None or self._windows[0].step <= step - LAG):
            self._tell(self._windows.popleft())

    def _tell(self, window: _Window) -> None:
        *sums, gradient_norm = window.numbers().tolist()
        found = means(sums)
        if not found["samples"]:  # all its steps were left out
            return
        values: dict[str, Any] = {**found, **window.pace, **window.rates}
        values |= {"grad_norm": gradient_norm, "offset": window.offset}
        self._listeners.tell("step", epoch=window.epoch, step=window.step, values=values)
        if self._recorder:
            self._recorder.status(epoch=window.epoch, step=window.step, best=self._state.best.best)
