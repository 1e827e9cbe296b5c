"""One optimizer step: forward, backward, the weighting of losses, the update (invariant 3)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from launcher.engine.model import split_outputs
from launcher.engine.running_statistics import RunningStatistics
from launcher.engine.schedule import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.engine.data import Batch
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

    def run(self, step: Step, batches: Iterator[Batch]) -> None:
        """One optimizer step over this rank's micro-batches; only the last exchanges gradients."""
        state, last = self._state, len(step.micro_batches) - 1
        if step.lone and self._parts.ranks.world_size > 1:
            # A lone image is normalised by running statistics: each rank has its own, a checkpoint has rank 0's.
            self._statistics.broadcast()
        statistics, losses = self._statistics.copy(), []
        for number in range(last + 1):
            batch: Batch = next(batches)
            if state.step in state.skipped:
                continue
            # After the batch: without loader processes its transforms use this same generator.
            torch.manual_seed(derive_seed(self._parts.recipe.seed, state.step, self._parts.ranks.rank, number))
            with contextlib.nullcontext() if number == last else self._parts.ddp.no_sync():
                losses.append(self._backward(batch, num_samples=step.num_samples))
        if losses:
            self._statistics.put_back(statistics, where=self._update(step, losses))

    def _update(self, step: Step, losses: list[torch.Tensor]) -> torch.Tensor:
        """Move the weights, unless loss or gradient is no number: which the device decides, nobody waits for it.

        Returns:
            On the device, 1 where the step was left out, else 0.
        """
        state, optimizer, limit = self._state, self._parts.optimizer, self._parts.recipe.train.clip_grad_norm
        state.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        flag = state.numbers.flag(norm, losses)
        state.numbers.watch(state.step, flag, losses, step.micro_batches)
        # What GradScaler hands to fused optimizers; where it is on it does so itself, of the gradients it has seen.
        optimizer.found_inf = flag  # type: ignore[attr-defined]
        state.scaler.step(optimizer)
        state.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return flag

    def _backward(self, batch: Batch, *, num_samples: int) -> torch.Tensor:
        """Add a micro-batch's share of the global batch's mean gradient (invariant 3); return the sum of its losses.

        DDP averages over W ranks; with each sample's loss weighted W / num_samples that average is the gradient of the
        mean loss over all samples of the step, however they are spread over ranks and micro-batches.
        """
        images, labels = self._parts.to_device(batch)
        num = len(labels)
        if not num:  # a rank with no sample left still takes part in DDP; the output is not used
            images = images.new_zeros(1, *images.shape[1:])
        fixed = self._parts.model.fixed_statistics() if len(images) == 1 else contextlib.nullcontext()
        with fixed, self._parts.autocast():
            outputs = self._parts.ddp(images)
            logits, auxiliary = split_outputs(self._parts.recipe.model.arch, outputs)
            logits = logits[:num]
            loss = self._loss_sum(logits, labels)
            total = loss + sum(weight * self._loss_sum(o[:num], labels) for weight, o in auxiliary)
        scaled = self._state.scaler.scale(total * (self._parts.ranks.world_size / num_samples))
        scaled.backward()  # type: ignore[no-untyped-call]
        for totals in (self._state.window_totals, self._state.epoch_totals):
            totals.add(loss.detach(), logits.detach(), labels)
        return loss.detach()

    def _loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        smoothing = self._parts.recipe.train.label_smoothing
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
