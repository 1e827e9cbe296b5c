"""One optimizer step: its micro-batches, and the update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.engine import optim
from launcher.engine.micro_batch import MicroBatch
from launcher.engine.running_statistics import RunningStatistics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.engine.loading.handover import Batch
    from launcher.engine.schedule import Step
    from launcher.engine.setup import Parts
    from launcher.engine.state import TrainingState


class TrainStep:
    """Takes steps on one rank.

    Args:
        parts: model, data, optimizer and who we are.
        state: of the training, which a step changes.
    """

    def __init__(self, parts: Parts, state: TrainingState) -> None:
        self._parts = parts
        self._state = state
        self._parameters = list(parts.model.module.parameters())
        self._statistics = RunningStatistics(parts.model.module)
        self._micro_batch = MicroBatch(parts, state, self._statistics)
        self.last_gradient: Any = None
        """The device's stamp when the last gradient of the last step was there; None: the step was left out."""
        self.gradient_norm = torch.zeros(())
        """Of the last step, before it was clipped; on the device."""

    @property
    def largest_that_fits(self) -> int | None:
        """The largest batch that this rank could do since memory ran out for a larger one; None: it never has."""
        return self._micro_batch.largest_that_fits

    def run(self, step: Step, batches: Iterator[Batch]) -> None:
        """One optimizer step over this rank's micro-batches; only the last exchanges gradients."""
        state, last = self._state, len(step.micro_batches) - 1
        if step.lone and self._parts.ranks.world_size > 1:
            # A lone image is normalised by running statistics: each rank has its own, a checkpoint has rank 0's.
            self._statistics.broadcast()
        statistics, losses = self._statistics.copy(), []
        for number in range(last + 1):
            batch: tuple[torch.Tensor, ...] = next(batches)
            if state.step in state.skipped:
                continue
            if weights := self._parts.weights:
                batch = (*batch, weights.of(step.micro_batches[number]))
            before, sync = None if number else statistics, number == last
            loss = self._micro_batch.run(batch, (number,), num_samples=step.num_samples, sync=sync, before=before)
            losses.append(loss)
        self.last_gradient = self._micro_batch.progress.last_gradient if losses else None
        if losses:
            self._statistics.put_back(statistics, where=self._update(step, losses))
            state.average.update(state.step, state.epoch)

    def _update(self, step: Step, losses: list[torch.Tensor]) -> torch.Tensor:
        """Move the weights, unless loss or gradient is NaN or infinite: the device decides, and nobody waits for it.

        Returns:
            On the device, 1 where the step was left out, else 0.
        """
        state, optimizer, config = self._state, self._parts.optimizer, self._parts.recipe.train
        state.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if config.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, config.clip_grad_norm, norm)
        if config.clip_grad_value is not None:  # of what is finite: else the step is left out
            nn.utils.clip_grad_value_(self._parameters, config.clip_grad_value)
        self.gradient_norm = norm
        flag = state.numbers.flag(norm, losses)
        state.numbers.watch(state.step, flag, norm, losses, step.micro_batches)
        state.finish_capture()
        optim.step(optimizer, state.scaler, flag)
        state.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return flag
