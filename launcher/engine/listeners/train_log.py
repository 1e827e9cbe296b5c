"""Training's log: sums over the last steps of all ranks, which no step waits for."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine import optim
from launcher.engine.augmenting.sample_batch import FirstBatch
from launcher.engine.metrics import means
from launcher.engine.non_finite import LAG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from launcher.engine.listeners.listeners import Listeners
    from launcher.engine.listeners.rank_times import RankTimes
    from launcher.engine.listeners.recorder import Recorder
    from launcher.engine.loading.handover import Batch
    from launcher.engine.loading.pace import Pace
    from launcher.engine.schedule import Step
    from launcher.engine.setup import Parts
    from launcher.engine.state import TrainingState


class TrainLog:
    """Tells the listeners of a window's loss and speed, in the order of the windows.

    On a GPU each is read when the flags of its last step are (:data:`launcher.engine.non_finite.LAG`), so that the GPU
    never runs out of work.

    Args:
        parts: model, data, optimizer and who we are.
        state: of the training.
        pace: clocks of this rank.
        listeners: which are told.
        recorder: on rank 0; the others are not told.
        times: what each rank does with its time.
    """

    def __init__(
        self,
        parts: Parts,
        state: TrainingState,
        pace: Pace,
        listeners: Listeners,
        recorder: Recorder | None,
        times: RankTimes,
    ) -> None:
        self._parts = parts
        self._state = state
        self._pace = pace
        self._listeners = listeners
        self._recorder = recorder
        self._times = times
        self._first_batch = FirstBatch(parts)
        self._due: deque[tuple[int, Callable[[], None]]] = deque()

    def first_batch(self, step: Step, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of a run's first step, of whose images rank 0 keeps some for people to see."""
        return self._first_batch.of(step, batches)

    def first_step(self) -> None:
        """The first step was taken: rank 0 tells the loss of its own images, for which it waits for no other rank."""
        state, recorder = self._state, self._recorder
        if not recorder:
            return
        recorder.event("first_step")
        with self._pace.left_out():
            self._first_batch.write(recorder.say)
        if self._parts.recipe.tracking.log_every == 1:
            return
        position = {"epoch": state.epoch, "step": state.step}
        sums = self._parts.device.to_host_later(state.window_totals.of_rank())

        def tell() -> None:
            found = means(sums().tolist())
            if found["samples"]:  # else it was left out
                recorder.first_step(**position, loss=found["loss"])

        self._later(tell)

    def end_window(self, gradient_norm: torch.Tensor) -> None:
        """A window ends with the step that was just taken. Every rank must call it.

        Args:
            gradient_norm: of that step, on the device.
        """
        state, recorder = self._state, self._recorder
        sums = state.window_totals.over_ranks()
        state.window_totals.reset()
        values: dict[str, Any] = {**self._pace.window(), **optim.rates(self._parts.optimizer), "offset": state.offset}
        position = {"epoch": state.epoch, "step": state.step}
        step_s, wait_s = self._pace.last_window
        values |= self._times.end_window(position, step_s=step_s, wait_s=wait_s)
        if not recorder:
            return
        if (held := self._parts.device.peak_memory()) is not None:
            values["memory_mb"] = round(held / 1e6, 1)
        numbers = self._parts.device.to_host_later(torch.cat([sums, gradient_norm.double().reshape(1)]))

        def tell() -> None:
            *of_window, norm = numbers().tolist()
            found = means(of_window)
            if found["samples"]:  # else all its steps were left out
                self._listeners.tell("step", **position, values={**found, **values, "grad_norm": norm})
                recorder.status(epoch=position["epoch"], step=position["step"], best=state.best.best)

        self._later(tell)

    def tell(self, step: int | None = None) -> None:
        """Tell what is due before ``step``; None: all."""
        while self._due and (step is None or self._due[0][0] <= step - LAG):
            self._due.popleft()[1]()

    def _later(self, tell: Callable[[], None]) -> None:
        self._due.append((self._state.step, tell))
        if not self._parts.device.runs_ahead:
            self.tell()
