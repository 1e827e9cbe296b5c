"""The training loop: one for every task, device and world size."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import TYPE_CHECKING, Any

from launcher.engine import distributed, optim
from launcher.engine.batchnorm_recompute import BatchNormRecompute
from launcher.engine.checkpoints.saving import Saving
from launcher.engine.features.features import Features
from launcher.engine.listeners.listeners import build_listeners, start_values
from launcher.engine.listeners.rank_times import RankTimes
from launcher.engine.listeners.train_log import TrainLog
from launcher.engine.loading.handover import Feed, end_loaders
from launcher.engine.loading.pace import Pace
from launcher.engine.metrics import means
from launcher.engine.non_finite import CURE, report
from launcher.engine.state import TrainingState
from launcher.engine.stopping import Redeal, RollBack, StopTraining
from launcher.engine.train_step import TrainStep
from launcher.engine.validating import test_set
from launcher.engine.validating.best import BestValidation
from launcher.engine.validating.noise import Noise
from launcher.engine.validating.validation import Validation
from launcher.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from launcher.engine.listeners.recorder import Recorder
    from launcher.engine.loading.handover import Batch
    from launcher.engine.non_finite import NonFiniteStep
    from launcher.engine.schedule import Step
    from launcher.engine.setup import Parts
    from launcher.engine.state import Outcome

MAX_ROLLBACKS = 3


class Trainer:
    """Trains on one rank, from the parts that :mod:`launcher.engine.setup` built.

    Args:
        parts: model, data, optimizer and who we are.
        recorder: on rank 0.
        stop_requested: whether this rank has been asked to stop.
        alive: called at every step and validation batch.
        memory_kills: how often the kernel killed a worker of this node for want of memory since the last checkpoint.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        recorder: Recorder | None,
        stop_requested: Callable[[], bool],
        alive: Callable[[], None] = lambda: None,
        memory_kills: int = 0,
    ) -> None:
        self.parts = parts
        self.recipe = parts.recipe
        self._recorder = recorder
        self._stop_requested = stop_requested
        self._alive = alive
        self._memory_kills = memory_kills
        self._agreement = distributed.Agreement(num_wishes=3, hang_timeout_s=self.recipe.train.hang_timeout_s)
        self.state = TrainingState(parts, self._agreement.gather(parts.device.total_memory()))
        self._listeners = build_listeners(parts, recorder)
        self._saving = Saving(parts, self.state, recorder, self._listeners)
        self._pace = Pace(parts.device)
        self._wrapped = self._holds_best = False
        self._step = TrainStep(parts, self.state)
        self._times = RankTimes(parts.device, recorder, self._agreement.group)
        self._log = TrainLog(parts, self.state, self._pace, self._listeners, recorder, self._times)
        self._validation = Validation(parts)
        self._noise = Noise(recorder)
        self._best_validation = BestValidation(parts, recorder)
        self._features = Features(parts, recorder, stop=stop_requested, poll=self._poll, on_disk=memory_kills > 0)
        self._batchnorm = BatchNormRecompute(parts, recorder, keep=self._features.begin)
        self._feed: Feed | None = None
        self.outcome: Outcome = "preempted"
        """How the training has ended; until then as if it were stopped now."""

    @property
    def best(self) -> dict[str, Any] | None:
        """The watched metric's best value, ``{metric, value, epoch, step}``."""
        return self.state.best.best

    def run(self) -> Outcome:
        """Train from where the last checkpoint stands to the end, or until all ranks agree to stop.

        Raises:
            TrainingError: the loss or the gradient is NaN or infinite and ``train.on_nan`` says to stop; or the disk
                does not take the last checkpoint.
        """
        resumed = self._saving.restore()
        self._limit_batches(max(1, self._batch_size >> self._memory_kills))
        self._prepare_epoch()
        self._listeners.tell("start", **start_values(self.parts, epoch=self.state.epoch, step=self.state.step))
        if not resumed and self.recipe.train.on_nan == "rollback":
            self._save(best=False)
        while True:  # once, and again after going back to a checkpoint or to smaller batches
            try:
                with self._stoppable():
                    while self._take_next():
                        pass
                    self._measure_test_set()
                    self.outcome = self._end()
                break
            except RollBack as bad:
                self._roll_back(bad.step)
            except Redeal:
                self._limit_batches(self._fitting_size)
        self._agreement.collect()
        self._times.collect()
        self.parts.close_loaders()
        self._saving.finish(again=self.outcome == "preempted")
        self._listeners.tell("end", outcome=self.outcome, best=self.best)
        return self.outcome

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Save where all ranks agree to stop."""
        try:
            yield
        except StopTraining:
            end_loaders()
            if not self._holds_best:
                self._save(best=False)
        finally:
            self._feed = None  # before another one begins: it holds images and loader processes

    def _begin_feed(self) -> None:
        """Begin to load the steps that are left of the training, if there are any."""
        parts, state, epochs = self.parts, self.state, self.recipe.train.epochs
        if not self._finished() and parts.schedule.is_over(state.epoch, state.offset):
            self._end_epoch()  # stopped before its validation, or what was left of it is left out now
        if self._finished():
            return
        with self._pace.left_out():
            self._features.begin(state.epoch)
        steps = parts.schedule.steps(parts.ranks.rank, epoch=state.epoch, offset=state.offset, end_epoch=epochs)
        batches = iter(parts.train_loader(state.epoch, state.offset))
        ahead = parts.loading.workers > 0 and not parts.kept
        self._feed = Feed(steps, batches, self._stop_requested, self._pace.waiting, parts.device.send, ahead=ahead)
        self._poll(self._feed, asked=False)  # the first step, too, is taken when all hold its batches
        self._pace.begin()

    def _take_next(self) -> bool:
        """Take the next optimizer step; False after the last."""
        if self._feed is None:
            self._begin_feed()
        if self._feed is None or self._finished():
            return False
        self._poll(self._feed)
        taken = self._feed.take()
        if taken:
            self._take(*taken)
        return taken is not None

    def _take(self, step: Step, of_step: Iterator[Batch]) -> None:
        """Take an optimizer step, and end the epoch after its last one."""
        parts, state = self.parts, self.state
        optim.set_lr(parts.optimizer, self.recipe, self._progress(step), parts.schedule.batching.global_batch_size)
        began, waited = parts.device.stamp(), self._pace.window_waited
        self._step.run(step, of_step if state.step else self._log.first_batch(step, of_step))
        self._times.step(began, self._step.last_gradient, self._pace.window_waited - waited)
        state.step += 1
        state.offset = step.end
        self._pace.took(step.num_samples)
        if self._recorder:
            part = state.offset / parts.schedule.num_samples
            self._recorder.progress(epoch=state.epoch, step=state.step, part=part)
            if state.step == 1:
                self._log.first_step()
        if state.step % self.recipe.tracking.log_every == 0:
            self._log.end_window(self._step.gradient_norm)
        if state.offset >= parts.schedule.num_samples or self._finished():
            if self._recorder and (text := self._pace.explain_wait(self.recipe.data)):
                self._recorder.say(f"epoch {state.epoch + 1}: {text}")
                self._recorder.event("data_wait", epoch=state.epoch, message=text)
            self._pace.pause()
            self._end_epoch()
            self._pace.begin()

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

    def _measure_test_set(self) -> None:
        """Where there is one, by the best checkpoint, whose weights the model has from here on."""
        if self.recipe.data.test is not None and self.best:
            self._saving.wait()
            self._holds_best = True
            stop, poll = self._stop_requested, self._poll
            test_set.measure(self.parts, self.best, self._validation, self._recorder, stop=stop, poll=poll)

    def _end(self) -> Outcome:
        """How the training has ended, all steps done."""
        state = self.state
        return "early_stopped" if state.best.exhausted and state.epoch < self.recipe.train.epochs else "completed"

    def _end_epoch(self) -> None:
        """Validate, keep the best, checkpoint; leaves the position at the next epoch's start."""
        self._check_numbers()
        state = self.state
        totals = means(state.epoch_totals.reduce())
        if self._recorder and totals["samples"]:
            self._recorder.epoch(epoch=state.epoch, values=totals | {"images_per_s": self._pace.epoch_speed})
        recompute = functools.partial(self._batchnorm.run, epoch=state.epoch, step=state.step, poll=self._poll)
        values = state.average.beside(recompute, self._validate)
        if not math.isfinite(values["loss"]):
            where = f"at step {state.step} (epoch {state.epoch + 1})"
            raise TrainingError(f"training diverged: the validation loss is {values['loss']} {where}; {CURE}")
        epoch = state.epoch
        watched = {f"val/{k}": v for k, v in values.items()} | {"train/loss": totals["loss"]}
        former, answers = state.best.best, self._validation.take_answers()
        is_best = state.best.take(watched, epoch=epoch, step=state.step)
        if is_best and self.best:
            of_best = answers[-1 if "weights" in self.best else 0]
            self._noise.judge(former, self.best, of_best)
            self._best_validation.take(self.best, of_best)
        state.epoch, state.offset = epoch + 1, 0
        state.epoch_totals.reset()
        self._listeners.tell("validation", epoch=epoch, step=state.step, values=values, best=is_best)
        if self._recorder:
            self._recorder.status(epoch=state.epoch, step=state.step, best=self.best)
            if state.best.exhausted and state.epoch < self.recipe.train.epochs:
                self._recorder.event("early_stopped", epoch=epoch, step=state.step, waited=state.best.waited)
        if self.parts.kept:
            self._feed = None  # of the next epoch other views are kept, or none
        if not self._finished():
            self._prepare_epoch()
        self._save(best=is_best)

    def _prepare_epoch(self) -> None:
        """Have learn what learns in this epoch; DDP is made anew where that changed which gradients there are."""
        self._features.leave(self.state.epoch)
        if self.parts.enter(self.state.epoch) or not self._wrapped:
            self.parts.wrap()
            optim.prepare_momentum(self.parts.optimizer)
            self._wrapped = True
        self.parts.model.train()

    def _validate(self) -> dict[str, Any]:
        return self._validation.run(self._features.validation, stop=self._stop_requested, poll=self._poll)

    def _poll(self, feed: Feed | None = None, *, asked: bool = True) -> None:
        """Learn whether all stop or save here. Raises StopTraining.

        Args:
            feed: of which this rank is to hold one more step before it says that it can take one.
            asked: whether to look if this rank was asked to stop; else it does so only where it waits in vain.
        """
        self._alive()
        self._listeners.deliver()
        stop, save, smaller = self._agreement.collect()
        if stop:
            raise StopTraining
        if smaller:
            raise Redeal
        step = self.state.step
        self._check_numbers(step)
        if self._saving.is_due(wished=save):
            self._save(best=False)
        if feed:
            feed.hold()
        stop = self._stop_requested() if asked else feed is not None and feed.starved
        self._agreement.propose(stop, self._saving.wish, self._fitting_size < self._batch_size)

    def _check_numbers(self, step: int | None = None) -> None:
        """Act upon the steps that were left out, of those before ``step`` that are due; None: of all.

        What these steps have to log is told before.
        """
        self._log.tell(step)
        for found in self.state.numbers.read(step):
            self._on_non_finite(found)

    def _on_non_finite(self, found: NonFiniteStep) -> None:
        """``train.on_nan``. Raises TrainingError or RollBack, on every rank at the same step."""
        paths = [self.parts.train_set.samples[index][0] for index in found.samples]
        num_in_a_row = self.state.numbers.num_in_a_row
        report(found, paths, self._recorder, policy=self.recipe.train.on_nan, num_in_a_row=num_in_a_row)
        if self.recipe.train.on_nan == "rollback":
            raise RollBack(found.step)

    def _roll_back(self, bad: int) -> None:
        """Go back to the last checkpoint, to do without the step that came after ``bad`` others."""
        skipped = sorted({*self.state.skipped, bad})
        if len(skipped) > MAX_ROLLBACKS:
            raise TrainingError(
                f"went back {MAX_ROLLBACKS} times already, and now step {bad + 1} is NaN or infinite; {CURE}"
            )
        self._saving.wait()
        self._log.tell()
        self.state.numbers.forget()
        self._saving.restore()
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

    def _limit_batches(self, fitting: int) -> None:
        """Take smaller batches where memory ran out; the samples of every step stay the same.

        Args:
            fitting: what this rank can take at once.
        """
        before, sizes = self.parts.schedule.batching.batch_sizes, self._agreement.gather(fitting)
        if sizes == list(before):
            return
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
        """Have a checkpoint written, of steps whose numbers were looked at."""
        self._check_numbers()
        self._saving.save(best=best)
