"""The training loop: one for every task, device and world size."""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from launcher.engine import checkpoint as checkpoints
from launcher.engine import distributed, optim
from launcher.engine.metrics import ValidationTotals, means
from launcher.engine.state import TrainingState
from launcher.engine.train_step import TrainStep
from launcher.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.engine.non_finite import NonFiniteStep
    from launcher.engine.recorder import Recorder
    from launcher.engine.schedule import Step
    from launcher.engine.setup import Parts

Outcome = Literal["completed", "early_stopped", "preempted"]


CURE = "lower optim.lr or its groups, or lengthen optim.warmup_epochs, and start again"
MAX_ROLLBACKS = 3
MAX_NON_FINITE_IN_A_ROW = 10


class StopTraining(Exception):  # noqa: N818  a signal to leave the loops, no error
    """All ranks agreed to stop here."""


class RollBack(Exception):  # noqa: N818  a signal to leave the loops, no error
    """All ranks go back to the last checkpoint, and do without ``step`` from then on."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class Redeal(Exception):  # noqa: N818  a signal to leave the loops, no error
    """Memory ran out on some rank: from here on it takes smaller batches, and all have to know."""


class Trainer:
    """Trains on one rank, from the parts that :mod:`launcher.engine.setup` built.

    Args:
        parts: model, data, optimizer and who we are.
        recorder: on rank 0.
        stop_requested: whether this rank has been asked to stop.
    """

    def __init__(self, parts: Parts, *, recorder: Recorder | None, stop_requested: Callable[[], bool]) -> None:
        self.parts = parts
        self.recipe = parts.recipe
        self._recorder = recorder
        self._stop_requested = stop_requested
        self._agreement = distributed.Agreement(num_wishes=3)
        self.state = TrainingState(parts)
        self._writer = self._build_writer() if recorder else None
        self._timed_since = self._saved_at = time.monotonic()
        self._timed_samples = 0
        self._wrapped = False
        self._saved_step = 0
        self._step = TrainStep(parts, self.state)

    @property
    def best(self) -> dict[str, Any] | None:
        """The watched metric's best value, ``{metric, value, epoch, step}``."""
        return self.state.best.best

    def run(self) -> Outcome:
        """Train from where the last checkpoint stands to the end, or until all ranks agree to stop.

        Raises:
            TrainingError: the loss or the gradient is no number and ``train.on_nan`` says to stop; or the disk does not
                take the last checkpoint.
        """
        resumed = self._restore()
        self._prepare_epoch()
        if not resumed and self.recipe.train.on_nan == "rollback":
            self._save(best=False)
        while True:
            try:
                outcome = self._go_on()
                break
            except RollBack as bad:
                self._roll_back(bad.step)
            except Redeal:
                self._redeal()
        self._agreement.collect()
        if self._writer:
            self._finish_writing(self._writer, outcome)
        return outcome

    def _go_on(self) -> Outcome:
        try:
            if self.state.offset >= self.parts.schedule.num_samples and not self._finished():
                self._end_epoch()  # stopped between an epoch and its validation
            return self._train()
        except StopTraining:
            self._save(best=False)
            return "preempted"

    def _train(self) -> Outcome:
        parts, state, epochs = self.parts, self.state, self.recipe.train.epochs
        if self._finished():
            return self._outcome()
        steps = parts.schedule.steps(parts.ranks.rank, epoch=state.epoch, offset=state.offset, end_epoch=epochs)
        batches = iter(parts.train_loader(state.epoch, state.offset))
        for step in steps:
            self._poll()
            lr = optim.set_lr(
                parts.optimizer, self.recipe, self._progress(step), parts.schedule.batching.global_batch_size
            )
            self._step.run(step, batches)
            state.step += 1
            state.offset = step.end
            self._timed_samples += step.num_samples
            if self._recorder:
                self._recorder.step(state.step)
                if state.step == 1:
                    self._recorder.event("first_step")
            if state.step % self.recipe.tracking.log_every == 0:
                self._log_window(lr)
            if state.offset >= parts.schedule.num_samples or self._finished():
                self._end_epoch()
                if self._finished():
                    break
        return self._outcome()

    def _progress(self, step: Step) -> float:
        """Epochs done at the middle of ``step``."""
        return step.epoch + (step.offset + step.end) / 2 / self.parts.schedule.num_samples

    def _finished(self) -> bool:
        state, limit = self.state, self.parts.max_steps
        return (
            state.epoch >= self.recipe.train.epochs
            or state.best.exhausted
            or (limit is not None and state.step >= limit)
        )

    def _outcome(self) -> Outcome:
        state = self.state
        return "early_stopped" if state.best.exhausted and state.epoch < self.recipe.train.epochs else "completed"

    def _end_epoch(self) -> None:
        """Validate, keep the best, checkpoint; leaves the position at the next epoch's start."""
        self._check_numbers()
        ended_at, state = time.monotonic(), self.state
        totals = means(state.epoch_totals.reduce())
        values = self._validate()
        if not math.isfinite(values["loss"]):
            where = f"at step {state.step} (epoch {state.epoch + 1})"
            raise TrainingError(f"training diverged: the validation loss is {values['loss']} {where}; {CURE}")
        epoch = state.epoch
        watched = {f"val/{k}": v for k, v in values.items()} | {"train/loss": totals["loss"]}
        is_best = state.best.update(watched[state.best.metric], epoch=epoch, step=state.step)
        state.epoch, state.offset = epoch + 1, 0
        state.epoch_totals.reset()
        if self._recorder:
            self._recorder.validation(epoch=epoch, step=state.step, values=values, best=is_best)
            self._recorder.status(epoch=state.epoch, step=state.step, best=self.best)
            if state.best.exhausted and state.epoch < self.recipe.train.epochs:
                self._recorder.event("early_stopped", epoch=epoch, step=state.step, waited=state.best.waited)
        if not self._finished():
            self._prepare_epoch()
        self._save(best=is_best)
        self._timed_since += time.monotonic() - ended_at  # validation is no part of the speed of training

    def _prepare_epoch(self) -> None:
        """Freeze what this epoch freezes; DDP is made anew where that changed which gradients there are."""
        if self.parts.model.freeze(self.state.epoch) or not self._wrapped:
            self.parts.wrap()
            optim.prepare_momentum(self.parts.optimizer)
            self._wrapped = True
        self.parts.model.train()

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Counts over the whole validation set, every image once, the same on every rank."""
        parts = self.parts
        distributed.broadcast_buffers(parts.model.module)
        parts.model.eval()
        totals = ValidationTotals(parts.classes, parts.device.torch_device)
        for batch in parts.val_loader():
            self._poll()
            images, labels = parts.to_device(batch)
            if len(labels):
                with parts.autocast():
                    logits = parts.model.module(images)
                totals.add(logits, labels)
        return totals.compute()

    def _poll(self) -> None:
        """Learn whether all stop or save here. Raises StopTraining."""
        stop, save, smaller = self._agreement.collect()
        if stop:
            raise StopTraining
        if smaller:
            raise Redeal
        step = self.state.step
        self._check_numbers(step)
        every, minutes = self.recipe.train.checkpoint.every_steps, self.recipe.train.checkpoint.every_minutes
        if step > self._saved_step and (save or (every is not None and step % every == 0)):
            self._save(best=False)
        due = minutes is not None and time.monotonic() - self._saved_at > minutes * 60
        self._agreement.propose(self._stop_requested(), due, self._fitting_size < self._batch_size)

    def _log_window(self, lr: float) -> None:
        state = self.state
        sums = means(state.window_totals.reduce())
        state.window_totals.reset()
        now = time.monotonic()
        values = {**sums, "lr": lr, "images_per_s": self._timed_samples / (now - self._timed_since)}
        self._timed_since, self._timed_samples = now, 0
        if self._recorder and sums["samples"]:  # none where all its steps were left out
            self._recorder.train(epoch=state.epoch, step=state.step, values={**values, "offset": state.offset})
            self._recorder.status(epoch=state.epoch, step=state.step, best=self.best)

    def _check_numbers(self, step: int | None = None) -> None:
        """Act upon the steps that were left out, of those before ``step`` that are due; None: of all."""
        for found in self.state.numbers.read(step):
            self._on_non_finite(found)

    def _on_non_finite(self, found: NonFiniteStep) -> None:
        """``train.on_nan``. Raises TrainingError or RollBack, on every rank at the same step."""
        policy, number = self.recipe.train.on_nan, found.step + 1
        paths = [self.parts.train_set.samples[index][0] for index in found.samples]
        if paths:
            with contextlib.suppress(OSError):  # a full disk
                print("\n  ".join([f"step {number}: loss or gradient is no number; images of this rank:", *paths]))
        if self._recorder:
            self._recorder.event("non_finite", step=number, policy=policy)
            self._recorder.say(f"step {number}: the loss or its gradient is no number; train.on_nan={policy}")
        if policy == "stop":
            raise TrainingError(
                f"the loss or its gradient is no number (NaN or infinite) in step {number}, which did not reach the "
                f"weights; each rank's log names its images; {CURE}; or train.on_nan=skip leaves such steps out"
            )
        if self.state.numbers.num_in_a_row >= MAX_NON_FINITE_IN_A_ROW:
            raise TrainingError(f"{MAX_NON_FINITE_IN_A_ROW} steps in a row up to {number} had no finite loss; {CURE}")
        if policy == "rollback":
            raise RollBack(found.step)

    def _roll_back(self, bad: int) -> None:
        """Go back to the last checkpoint, to do without the step that came after ``bad`` others."""
        skipped = sorted({*self.state.skipped, bad})
        if len(skipped) > MAX_ROLLBACKS:
            raise TrainingError(f"went back {MAX_ROLLBACKS} times already, and now step {bad + 1} is no number; {CURE}")
        if self._writer:
            self._writer.wait()
        self.state.numbers.forget()
        self._restore()
        self.state.skipped = skipped
        self._prepare_epoch()
        if self._recorder:
            self._recorder.event("rolled_back", step=self.state.step, skipped=bad + 1)

    @property
    def _batch_size(self) -> int:
        """What this rank is to take at once."""
        return self.parts.schedule.batching.batch_sizes[self.parts.ranks.rank]

    @property
    def _fitting_size(self) -> int:
        """What this rank can take at once, as far as it knows."""
        limit = self._step.largest_that_fits
        return self._batch_size if limit is None else min(limit, self._batch_size)

    def _redeal(self) -> None:
        """Take smaller batches where memory ran out; the samples of every step stay the same."""
        before, sizes = self.parts.schedule.batching.batch_sizes, self._agreement.gather(self._fitting_size)
        self.state.limit_batches(sizes)
        if self._recorder:
            pairs = enumerate(zip(before, sizes, strict=True))
            changed = {str(rank): [old, new] for rank, (old, new) in pairs if old != new}
            self._recorder.event("out_of_memory", step=self.state.step, batch_sizes=changed)
            for rank, (old, new) in changed.items():
                self._recorder.say(
                    f"step {self.state.step}: memory ran out on rank {rank}: it goes on with batches of {new} instead "
                    f"of {old}, more of them a step; nothing is lost"
                )

    def _save(self, *, best: bool) -> None:
        """Have rank 0 write a checkpoint; every rank takes part in adding up the running sums."""
        self._check_numbers()
        checkpoint = self.state.capture()
        self._saved_at, self._saved_step = time.monotonic(), self.state.step
        if self._writer and checkpoint:
            self._writer.save(checkpoint, best=best)

    def _build_writer(self) -> checkpoints.CheckpointWriter:
        return checkpoints.CheckpointWriter(
            self.parts.run,
            keep=self.recipe.train.checkpoint.keep,
            on_written=self._written,
            on_failed=self._not_written,
            on_done=self.state.release,
        )

    def _written(self, step: int, seconds: float, size_mb: float, best: bool) -> None:  # noqa: FBT001  a callback
        if self._recorder:
            self._recorder.event(
                "checkpoint", step=step, seconds=round(seconds, 3), size_mb=round(size_mb, 3), best=best
            )

    def _not_written(self, step: int, problem: str) -> None:
        if self._recorder:
            self._recorder.event("checkpoint_failed", step=step, message=problem)
            self._recorder.say(f"{problem}; training goes on, and it is tried again")

    def _finish_writing(self, writer: checkpoints.CheckpointWriter, outcome: Outcome) -> None:
        try:
            writer.wait()
        except checkpoints.CheckpointError as error:
            if outcome != "preempted":
                raise
            if self._recorder:
                self._recorder.say(f"{error}; the run goes on from the one before it")

    def _restore(self) -> bool:
        """Go on from the newest checkpoint that is whole; rank 0 chooses, so that all take the same."""
        found = [checkpoints.load_newest(self.parts.run) if self._recorder else None]
        chosen = [found[0].step if found[0] else None]
        dist.broadcast_object_list(chosen, src=0)
        if chosen[0] is None:
            return False
        state = self.state
        state.restore(found[0] or checkpoints.load(self.parts.run.checkpoint(chosen[0])))
        self._saved_step = state.step
        if self._recorder:
            self._recorder.resumed(
                epoch=state.epoch, step=state.step, offset=state.offset, num_steps=self.parts.num_steps
            )
        return True
