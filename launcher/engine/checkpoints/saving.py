"""Decides when checkpoints are saved and loaded, and tells the recorder."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from launcher.engine import optim
from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.network.fitting import are_needed
from launcher.errors import TrainingError
from launcher.system import phases
from launcher.system.words import plural

if TYPE_CHECKING:
    from launcher.engine.checkpoints.checkpoint import Checkpoint
    from launcher.engine.listeners.listeners import Listeners
    from launcher.engine.listeners.recorder import Recorder
    from launcher.engine.setup import Parts
    from launcher.engine.state import TrainingState


class Saving:
    """Saves and loads checkpoints. Every rank has one and calls it at the same steps; rank 0's writes.

    Args:
        parts: what is trained.
        state: of the training.
        recorder: on rank 0.
        listeners: hear of each checkpoint.
    """

    def __init__(self, parts: Parts, state: TrainingState, recorder: Recorder | None, listeners: Listeners) -> None:
        self._parts = parts
        self._listeners = listeners
        self._state = state
        self._recorder = recorder
        self._config = parts.recipe.train.checkpoint
        self._writer = self._build_writer() if recorder else None
        self._saved_at = time.monotonic()
        self._saved_step = 0

    def save(self, *, best: bool) -> None:
        """Have rank 0 write a checkpoint; every rank takes part in adding up the running sums."""
        checkpoint = self._state.capture()
        self._saved_at, self._saved_step = time.monotonic(), self._state.step
        if self._writer and checkpoint:
            self._writer.save(checkpoint, best=best)

    def is_due(self, *, wished: bool) -> bool:
        """Whether to save after this step: it is the turn of one, or some rank ``wished`` for it by the clock."""
        step, every = self._state.step, self._config.every_steps
        return step > self._saved_step and (wished or (every is not None and step % every == 0))

    @property
    def wish(self) -> bool:
        """Whether a checkpoint is due by this rank's clock; the ranks have to agree on it."""
        minutes = self._config.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at > minutes * 60

    def wait(self) -> None:
        """Wait until everything that was saved is on the disk.

        Raises:
            CheckpointError: the disk did not take it.
        """
        if self._writer:
            with phases.during("writing the checkpoint"):
                self._writer.wait()

    def finish(self, *, again: bool) -> None:
        """As :meth:`wait`; if the run will resume (``again``), a failed write is logged instead of raised."""
        try:
            self.wait()
        except checkpoints.CheckpointError as error:
            if not again:
                raise
            if self._recorder:
                self._recorder.say(f"{error}; the run goes on from the one before it")

    def restore(self) -> bool:
        """Go on from the newest whole checkpoint; rank 0 chooses it, so that all ranks load the same."""
        run, state = self._parts.run, self._state
        found = checkpoints.load_newest(run) if self._recorder else None
        # Only rank 0 has read the weights, so that it alone knows: another node's cache says nothing.
        has_weights = self._recorder is not None and are_needed(self._parts.recipe.model, run)
        told: list[Any] = [found.step if found else None, has_weights]
        dist.broadcast_object_list(told, src=0)
        step, has_weights = told
        if step is None:
            if not has_weights:
                weights = self._parts.recipe.model.weights
                raise TrainingError(
                    f"no checkpoint of {run} is whole, and the weights that it began with, {weights}, are gone"
                )
            return False
        state.restore(found or checkpoints.load(run.checkpoint(step)))
        self._saved_step = state.step
        if self._writer:
            best = state.best.best
            with contextlib.suppress(OSError):  # a full disk
                self._writer.go_on(state.step, best=best["step"] if best else None)
        if self._recorder:
            self._recorder.resumed(
                epoch=state.epoch, step=state.step, offset=state.offset, num_steps=self._parts.num_steps
            )
            if found:
                self._tell_numerics(self._parts.numerics.changed_since(found.state))
                self._tell_groups(found)
        return True

    def _tell_numerics(self, changed: dict[str, list[Any]]) -> None:
        """Tell what the steps from here on are computed in, where that is another than before."""
        if changed and self._recorder:
            self._recorder.event("numerics_changed", step=self._state.step, **changed)
            said = ", ".join(f"{name} is {now} now, was {then}" for name, (then, now) in changed.items())
            self._recorder.say(f"from step {self._state.step} on: {said}")

    def _tell_groups(self, found: Checkpoint) -> None:
        """Tell what learns otherwise from here on though the recipe's groups are the same."""
        parts = self._parts
        changed = optim.other_groups(parts.model, parts.recipe, found.state, found.optimizer["optimizer"])
        if changed and self._recorder:
            self._recorder.event("groups_changed", step=self._state.step, **changed)
            words = {"rate": "another learning rate", "weight_decay": "another weight decay"}
            said = ", ".join(f"{words[key]} for {plural(num, 'tensor')}" for key, num in changed.items() if num)
            why = "this version of launch groups them otherwise than the one before, the recipe is the same"
            self._recorder.say(f"from step {self._state.step} on: {said} of the model ({why})")

    def _build_writer(self) -> checkpoints.CheckpointWriter:
        return checkpoints.CheckpointWriter(
            self._parts.run,
            keep=self._config.keep,
            on_written=self._written,
            on_failed=self._not_written,
            on_done=self._state.release,
        )

    def _written(self, step: int, seconds: float, size_mb: float, best: bool) -> None:  # noqa: FBT001  a callback
        path = str(self._parts.run.checkpoint(step))
        self._listeners.tell_later("checkpoint", step=step, path=path, best=best, seconds=seconds, size_mb=size_mb)

    def _not_written(self, step: int, problem: str) -> None:
        if self._recorder:
            self._recorder.event("checkpoint_failed", step=step, message=problem)
            self._recorder.say(f"{problem}; training goes on, and it is tried again")
