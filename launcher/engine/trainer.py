"""The training loop: one for every task, device and world size."""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from launcher.engine import checkpoint as checkpoints
from launcher.engine import distributed, optim
from launcher.engine.metrics import BestMetric, TrainTotals, ValidationTotals, means
from launcher.engine.model import load_state, split_outputs
from launcher.engine.schedule import derive_seed
from launcher.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.engine.data import Batch
    from launcher.engine.recorder import Recorder
    from launcher.engine.schedule import Step
    from launcher.engine.setup import Parts

Outcome = Literal["completed", "early_stopped", "preempted"]


class StopTraining(Exception):  # noqa: N818  a signal to leave the loops, no error
    """All ranks agreed to stop here."""


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
        self._agreement = distributed.Agreement(num_wishes=2)
        self._device = parts.device.torch_device
        self._precision = parts.device.precision(self.recipe.precision)
        self._scaler = parts.device.grad_scaler(self._precision)
        stop = self.recipe.train.early_stopping
        self._best = BestMetric(metric=stop.metric, mode=stop.mode, min_delta=stop.min_delta, patience=stop.patience)
        self._writer = (
            checkpoints.CheckpointWriter(parts.run, keep=self.recipe.train.checkpoint.keep, on_written=self._written)
            if recorder
            else None
        )
        self._window = TrainTotals(self._device)
        self._epoch_totals = TrainTotals(self._device)
        self._timed_since = self._saved_at = time.monotonic()
        self._timed_samples = 0
        self._wrapped = False
        self._saved_step = 0
        self.step = 0
        self.epoch = 0
        self.offset = 0

    @property
    def best(self) -> dict[str, Any] | None:
        """The watched metric's best value, ``{metric, value, epoch, step}``."""
        return self._best.best

    def run(self) -> Outcome:
        """Train from where the last checkpoint stands to the end, or until all ranks agree to stop."""
        self._resume()
        self._prepare_epoch()
        try:
            if self.offset >= self.parts.schedule.num_samples:  # stopped between an epoch and its validation
                self._end_epoch()
            outcome = self._train()
        except StopTraining:
            self._save(best=False)
            outcome = "preempted"
        self._agreement.collect()
        if self._writer:
            self._writer.wait()
        return outcome

    def _train(self) -> Outcome:
        parts, epochs = self.parts, self.recipe.train.epochs
        if self._finished():
            return self._outcome()
        steps = parts.schedule.steps(parts.ranks.rank, epoch=self.epoch, offset=self.offset, end_epoch=epochs)
        batches = iter(parts.train_loader(self.epoch, self.offset))
        for step in steps:
            self._poll()
            lr = optim.set_lr(parts.optimizer, self.recipe, self._progress(step))
            self._train_step(step, batches)
            self.step += 1
            self.offset = step.offset + step.num_samples
            self._timed_samples += step.num_samples
            if self._recorder:
                self._recorder.step(self.step)
                if self.step == 1:
                    self._recorder.event("first_step")
            if self.step % self.recipe.tracking.log_every == 0:
                self._log_window(lr)
            if self.offset >= parts.schedule.num_samples or self._finished():
                self._end_epoch()
                if self._finished():
                    break
        return self._outcome()

    def _progress(self, step: Step) -> float:
        """Epochs done at the middle of ``step``."""
        return step.epoch + (step.offset + step.num_samples / 2) / self.parts.schedule.num_samples

    def _finished(self) -> bool:
        limit = self.parts.max_steps
        return (
            self.epoch >= self.recipe.train.epochs or self._best.exhausted or (limit is not None and self.step >= limit)
        )

    def _outcome(self) -> Outcome:
        return "early_stopped" if self._best.exhausted and self.epoch < self.recipe.train.epochs else "completed"

    def _train_step(self, step: Step, batches: Any) -> None:
        """One optimizer step over this rank's micro-batches; only the last exchanges gradients."""
        last = len(step.micro_batches) - 1
        for number in range(last + 1):
            batch: Batch = next(batches)
            # After the batch: without loader processes its transforms use this same generator.
            torch.manual_seed(derive_seed(self.recipe.seed, self.step, self.parts.ranks.rank, number))
            with contextlib.nullcontext() if number == last else self.parts.ddp.no_sync():
                self._backward(batch, num_samples=step.num_samples)
        optimizer, limit = self.parts.optimizer, self.recipe.train.clip_grad_norm
        if limit is not None:
            self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.parts.model.module.parameters(), limit)
        self._scaler.step(optimizer)
        self._scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch, *, num_samples: int) -> None:
        """Add a micro-batch's share of the global batch's mean gradient (invariant 3).

        DDP averages over W ranks; with each sample's loss weighted W / num_samples that average is the gradient of the
        mean loss over all samples of the step, however they are spread over ranks and micro-batches.
        """
        images, labels = self._to_device(batch)
        num = len(labels)
        if not num:  # a rank with no sample left still takes part in DDP; the output is not used
            images = images.new_zeros(1, *images.shape[1:])
        fixed = self.parts.model.fixed_statistics() if len(images) == 1 else contextlib.nullcontext()
        with fixed, self.parts.device.autocast(self._precision):
            outputs = self.parts.ddp(images)
            logits, auxiliary = split_outputs(self.recipe.model.arch, outputs)
            logits = logits[:num]
            loss = self._loss_sum(logits, labels)
            total = loss + sum(weight * self._loss_sum(o[:num], labels) for weight, o in auxiliary)
        self._scaler.scale(total * (self.parts.ranks.world_size / num_samples)).backward()  # type: ignore[no-untyped-call]
        for totals in (self._window, self._epoch_totals):
            totals.add(loss.detach(), logits.detach(), labels)

    def _loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        smoothing = self.recipe.train.label_smoothing
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)

    def _to_device(self, batch: Batch) -> Batch:
        """Normalised float images, N x 3 x S x S, and labels, on the rank's device."""
        images, labels = batch
        if not len(labels):
            size = self.parts.preprocessing.image_size
            images = images.new_zeros(0, 3, size, size)
        images = images.to(self._device, non_blocking=True)
        images = self.parts.preprocessing.normalize(images)
        if self.parts.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels.to(self._device, non_blocking=True)

    def _end_epoch(self) -> None:
        """Validate, keep the best, checkpoint; leaves the position at the next epoch's start."""
        ended_at = time.monotonic()
        totals = means(self._epoch_totals.reduce())
        values = self._validate()
        self._check_finite(values["loss"], "validation loss")
        epoch = self.epoch
        watched = {f"val/{k}": v for k, v in values.items()} | {"train/loss": totals["loss"]}
        is_best = self._best.update(watched[self._best.metric], epoch=epoch, step=self.step)
        self.epoch, self.offset = epoch + 1, 0
        self._epoch_totals.reset()
        if self._recorder:
            self._recorder.validation(epoch=epoch, step=self.step, values=values, best=is_best)
            self._recorder.status(epoch=self.epoch, step=self.step, best=self._best.best)
            if self._best.exhausted and self.epoch < self.recipe.train.epochs:
                self._recorder.event("early_stopped", epoch=epoch, step=self.step, waited=self._best.waited)
        if not self._finished():
            self._prepare_epoch()
        self._save(best=is_best)
        self._timed_since += time.monotonic() - ended_at  # validation is no part of the speed of training

    def _prepare_epoch(self) -> None:
        """Freeze what this epoch freezes; DDP is made anew where that changed which gradients there are."""
        if self.parts.model.freeze(self.epoch) or not self._wrapped:
            self.parts.wrap()
            self._wrapped = True
        self.parts.model.train()

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Counts over the whole validation set, every image once, the same on every rank."""
        parts = self.parts
        distributed.broadcast_buffers(parts.model.module)
        parts.model.eval()
        totals = ValidationTotals(parts.classes, self._device)
        for batch in parts.val_loader():
            self._poll()
            images, labels = self._to_device(batch)
            if len(labels):
                with parts.device.autocast(self._precision):
                    logits = parts.model.module(images)
                totals.add(logits, labels)
        return totals.compute()

    def _poll(self) -> None:
        """Learn whether all stop or save here. Raises StopTraining."""
        stop, save = self._agreement.collect()
        if stop:
            raise StopTraining
        every, minutes = self.recipe.train.checkpoint.every_steps, self.recipe.train.checkpoint.every_minutes
        if self.step > self._saved_step and (save or (every is not None and self.step % every == 0)):
            self._save(best=False)
        due = minutes is not None and time.monotonic() - self._saved_at > minutes * 60
        self._agreement.propose(self._stop_requested(), due)

    def _log_window(self, lr: float) -> None:
        sums = means(self._window.reduce())
        self._check_finite(sums["loss"], "loss")
        self._window.reset()
        now = time.monotonic()
        values = {**sums, "lr": lr, "images_per_s": self._timed_samples / (now - self._timed_since)}
        self._timed_since, self._timed_samples = now, 0
        if self._recorder:
            self._recorder.train(epoch=self.epoch, step=self.step, values=values)
            self._recorder.status(epoch=self.epoch, step=self.step, best=self._best.best)

    def _check_finite(self, value: float, name: str) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"training diverged: the {name} is {value} at step {self.step} (epoch {self.epoch + 1}); lower "
                "optim.lr or its groups, or lengthen optim.warmup_epochs, and start again"
            )

    def _save(self, *, best: bool) -> None:
        """Have rank 0 write a checkpoint; every rank takes part in adding up the running sums."""
        state = {
            "run_id": self.parts.run_id,
            "step": self.step,
            "epoch": self.epoch,
            "offset": self.offset,
            "world_size": self.parts.ranks.world_size,
            "batch_sizes": list(self.parts.schedule.batch_sizes),
            "global_batch_size": self.parts.schedule.global_batch_size,
            "early_stopping": self._best.state(),
            "epoch_sums": list(self._epoch_totals.reduce()),
            "window_sums": list(self._window.reduce()),
            "classes": list(self.parts.classes),
        }
        self._saved_at, self._saved_step = time.monotonic(), self.step
        if self._writer:
            checkpoint = checkpoints.Checkpoint(
                step=self.step,
                model=checkpoints.to_host(self.parts.model.module.state_dict()),
                optimizer=checkpoints.to_host(
                    {"optimizer": self.parts.optimizer.state_dict(), "scaler": self._scaler.state_dict()}
                ),
                state=state,
            )
            self._writer.save(checkpoint, best=best)

    def _written(self, step: int, seconds: float, size_mb: float, best: bool) -> None:  # noqa: FBT001  a callback
        if self._recorder:
            self._recorder.event(
                "checkpoint", step=step, seconds=round(seconds, 3), size_mb=round(size_mb, 3), best=best
            )

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole; rank 0 chooses, so that all take the same."""
        found = [checkpoints.load_newest(self.parts.run) if self._recorder else None]
        chosen = [found[0].step if found[0] else None]
        dist.broadcast_object_list(chosen, src=0)
        if chosen[0] is None:
            return
        checkpoint = found[0] or checkpoints.load(self.parts.run.checkpoint(chosen[0]))
        state = checkpoint.state
        load_state(self.parts.model.module, checkpoint.model)
        self.parts.optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
        self._scaler.load_state_dict(checkpoint.optimizer["scaler"])
        self._best.restore(state["early_stopping"])
        self.step, self.epoch, self.offset = state["step"], state["epoch"], state["offset"]
        self._saved_step = self.step
        if self._recorder:
            self._epoch_totals.restore(state["epoch_sums"])
            self._window.restore(state["window_sums"])
            self._recorder.event("resumed", step=self.step, epoch=self.epoch, offset=self.offset)
            self._recorder.say(f"resumed at epoch {self.epoch + 1}, step {self.step}")
