"""A micro-batch's share of a step's gradient: forward, backward, the weighting of losses (invariant 3).

Where memory runs out, in the forward or the backward pass, on one rank or on all, the micro-batch is done again in
smaller pieces. The other ranks notice nothing but the time: they wait in DDP's exchange of gradients, as ever. Only
where it runs out within DDP itself nothing can be done again: its reducer is left in the middle of a change, and with
NCCL a collective may have begun. So it is with SyncBatchNorm, where all ranks pass together. That ends the attempt.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from launcher.engine.augmenting.mixing import choose_mix
from launcher.engine.device import is_out_of_memory
from launcher.engine.loading.samples import seed_generators
from launcher.engine.metrics import count
from launcher.engine.model import split_outputs
from launcher.engine.network import sync_batchnorm
from launcher.engine.schedule import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.hooks import RemovableHandle

    from launcher.engine.augmenting.mixing import Mix
    from launcher.engine.device import Device
    from launcher.engine.loading.handover import Batch
    from launcher.engine.running_statistics import RunningStatistics
    from launcher.engine.setup import Parts
    from launcher.engine.state import TrainingState


class ExchangeMemoryError(torch.OutOfMemoryError):
    """Memory ran out where ranks wait for each other; the run goes on from its last checkpoint, in smaller batches."""


@dataclass(frozen=True, kw_only=True)
class _Forward:
    """What a forward pass gave."""

    weighted: torch.Tensor
    """What to differentiate."""
    loss: torch.Tensor
    """Sum over the images."""
    logits: torch.Tensor
    labels: torch.Tensor
    mix: Mix
    """With whose labels these are mixed."""


class _Pass:
    """How far the forward and backward pass under way has come, and whether the model or DDP is at work.

    Args:
        module: the model.
        device: where it is.
    """

    def __init__(self, module: nn.Module, device: Device) -> None:
        self._parameters, self._device, self._num_learning = list(module.parameters()), device, 0
        self.last_gradient: Any = None
        """The device's stamp when it was there; None: it was not."""
        self.accumulated: set[nn.Parameter] = set()
        """Those whose gradients the backward pass has come to: they hold its share."""
        self._taken: set[nn.Parameter] = set()
        """Those of them whose gradients DDP has dealt with."""
        self.awaited = False
        """Whether DDP awaits the backward pass of the forward pass: each gradient goes to the other ranks."""
        self._within_ddp = False
        """Whether the forward pass is in DDP's own code, before or after the model's."""
        self._watched: weakref.ref[DistributedDataParallel] | None = None
        self._hooks: list[RemovableHandle] = []
        for parameter in self._parameters:
            learns = parameter.requires_grad
            parameter.requires_grad_(True)  # torch takes hooks of no others; which learn may change
            parameter.register_post_accumulate_grad_hook(self._accumulate)  # type: ignore[no-untyped-call]
            parameter.requires_grad_(learns)

    def begin(self, ddp: DistributedDataParallel) -> None:
        """Before a forward and backward pass through ``ddp``, which is made anew when other layers learn."""
        self.accumulated.clear()
        self.last_gradient = None
        self._num_learning = sum(p.requires_grad for p in self._parameters)
        self._taken.clear()
        self.awaited = self._within_ddp = False
        if self._watched is None or self._watched() is not ddp:
            self._watched = weakref.ref(ddp)
            self._watch()

    @contextlib.contextmanager
    def forward_of(self, ddp: DistributedDataParallel) -> Iterator[None]:
        """Follow a forward pass through ``ddp``, to the model's output."""
        self._within_ddp = True
        enter = ddp.module.register_forward_pre_hook(lambda *_: self._set_within_ddp(False), prepend=True)
        leave = ddp.module.register_forward_hook(lambda *_: self._set_within_ddp(True))
        with enter, leave:
            yield
        self._within_ddp = False
        self.awaited = ddp.require_backward_grad_sync

    def _accumulate(self, parameter: nn.Parameter) -> None:
        self.accumulated.add(parameter)
        if len(self.accumulated) == self._num_learning:
            self.last_gradient = self._device.stamp()

    def missing(self) -> list[nn.Parameter]:
        """Those that learn and whose gradients the backward pass has not come to."""
        return [p for p in self._parameters if p.requires_grad and p not in self.accumulated]

    @property
    def broke_in_ddp(self) -> bool:
        """Whether it was DDP that raised: around the model's forward pass, in a hook, or after the last gradient."""
        finishing = self.awaited and not self.missing()
        return self._within_ddp or finishing or self.accumulated != self._taken

    def _set_within_ddp(self, within: bool) -> None:  # noqa: FBT001  a hook can set no attribute
        self._within_ddp = within

    def _watch(self) -> None:
        """Have each gradient noted behind DDP's hook, which is not called through where that raises.

        Hooks of a gradient's place in the graph are called in their order, after those of the parameter itself.
        """
        for hook in self._hooks:
            hook.remove()
        learning = [p for p in self._parameters if p.requires_grad]
        self._hooks = [get_gradient_edge(p).node.register_hook(self._note(p)) for p in learning]

    def _note(self, parameter: nn.Parameter) -> Callable[..., None]:
        return lambda *_: self._taken.add(parameter)


class MicroBatch:
    """Takes micro-batches on one rank.

    Args:
        parts: model, data, optimizer and who we are.
        state: of the training; its sums of losses grow.
        statistics: of the model.
    """

    def __init__(self, parts: Parts, state: TrainingState, statistics: RunningStatistics) -> None:
        self._parts = parts
        self._state = state
        self._statistics = statistics
        self.progress = _Pass(parts.model.module, parts.device)
        self.largest_that_fits: int | None = None
        """The largest batch that could be done since memory ran out for a larger one; None: it never has."""

    def run(
        self,
        batch: Batch,
        number: tuple[int, ...],
        *,
        num_samples: int,
        sync: bool,
        before: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Add a micro-batch's share of the global batch's mean gradient; return the sum of its losses.

        Args:
            batch: its images and labels, and weights.
            number: of the micro-batch in its step, then of the piece of it, and so on: its randomness follows from it.
            num_samples: of the whole step, over all ranks.
            sync: exchange gradients with the other ranks.
            before: a copy of the running statistics as they are now, where there is one.

        Raises:
            ExchangeMemoryError: memory ran out within DDP.
            torch.OutOfMemoryError: there is not enough memory for a single image.
        """
        statistics = self._statistics.copy() if before is None else before
        done = self._try(batch, number, num_samples, sync=sync)
        if done is not None:
            return done
        if self.progress.accumulated or self.progress.awaited:
            return self._complete(batch, number, num_samples, statistics, sync=sync)

        def again(half: Batch, name: tuple[int, ...]) -> torch.Tensor:
            return self.run(half, name, num_samples=num_samples, sync=sync and name[-1] == 1)

        return self._in_halves(batch, number, statistics, again)

    def _in_halves(
        self,
        batch: Batch,
        number: tuple[int, ...],
        statistics: Sequence[torch.Tensor],
        again: Callable[[Batch, tuple[int, ...]], torch.Tensor],
    ) -> torch.Tensor:
        """Do a batch for which memory ran out once more, by ``again``, in two pieces; return the sum of its losses.

        By now nothing refers to what the pass that failed had made.
        """
        self._statistics.restore(statistics)
        self._parts.device.release_memory()
        sizes = _halves(len(batch[1]))
        halves: list[Batch] = list(zip(*(torch.split(part, sizes) for part in batch), strict=True))
        losses = [again(half, (*number, index)) for index, half in enumerate(halves)]
        size = max(sizes)
        self.largest_that_fits = min(self.largest_that_fits or size, size)
        return torch.stack(losses).sum()

    def _try(self, batch: Batch, number: tuple[int, ...], num_samples: int, *, sync: bool) -> torch.Tensor | None:
        """The usual way; None where memory ran out."""
        self.progress.begin(self._parts.ddp)
        try:
            with self._exchange(sync=sync):
                found = self._forward(self._parts.ddp, batch, number, num_samples)
                found.weighted.backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            if is_out_of_memory(error) and self.progress.broke_in_ddp:
                raise _in_exchange(error) from error
            if is_out_of_memory(error) and self._parts.schedule.together:
                raise _in_exchange(error, "all ranks made a pass together (model.sync_batchnorm)") from error
            if not _can_be_smaller(error, batch):
                raise
            return None
        return self._count(found)

    def _complete(
        self,
        batch: Batch,
        number: tuple[int, ...],
        num_samples: int,
        statistics: Sequence[torch.Tensor],
        *,
        sync: bool,
    ) -> torch.Tensor:
        """Go on after a backward pass that broke off in the middle: the gradients that it did not come to.

        They are computed piece by piece, without DDP, and then handed to it as if the backward pass had come to them:
        so every exchange with the other ranks that was not begun yet begins, with the right values. (BatchNorm depends
        on what else is in a batch: with it those that the pass had come to are of the whole batch, in this one step.)
        """
        missing = self.progress.missing()
        sums = [torch.zeros_like(p) for p in missing]

        def add(piece: Batch, name: tuple[int, ...]) -> torch.Tensor:
            before = self._statistics.copy()
            try:
                found = self._forward(self._parts.network, piece, name, num_samples)
                gradients = torch.autograd.grad(found.weighted, missing, allow_unused=True)
            except Exception as error:
                if not _can_be_smaller(error, piece):
                    raise
                found = None
            if found is None:
                return self._in_halves(piece, name, before, add)
            for one, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    one.add_(gradient)
            return self._count(found)

        loss = self._in_halves(batch, number, statistics, add)
        try:
            with self._exchange(sync=sync):
                torch.autograd.backward(missing, sums)
        except Exception as error:
            if is_out_of_memory(error):
                raise _in_exchange(error) from error
            raise
        return loss

    def _forward(self, module: nn.Module, batch: Batch, number: tuple[int, ...], num_samples: int) -> _Forward:
        """The loss of a batch, weighted so that DDP's average is the gradient of the global batch.

        DDP averages over W ranks; with each sample's loss weighted W / num_samples that average is the gradient of the
        mean loss over all samples of the step, however they are spread over ranks and micro-batches.
        """
        parts = self._parts
        # After the batch: without loader processes its transforms use this same generator.
        seed = derive_seed(parts.recipe.seed, self._state.step, parts.ranks.rank, *number)
        torch.manual_seed(seed)
        seed_generators(seed)  # Python's and numpy's too, which a model of the user's own may use
        images, labels, *weights = batch
        inputs, labels = parts.step_inputs((images, labels))
        data, size = parts.recipe.data, parts.preprocessing.image_size
        mix = choose_mix(data, seed=parts.recipe.seed, step=self._state.step, size=size)
        inputs, num = mix.images(inputs), len(labels)
        if not num:  # a rank with no sample left still takes part in DDP; the output is not used
            inputs = inputs.new_zeros(1, *inputs.shape[1:])
        fixed = contextlib.nullcontext() if len(inputs) > 1 else self._of_one_image(num)
        through = self.progress.forward_of(parts.ddp) if module is parts.ddp else contextlib.nullcontext()
        with fixed, parts.autocast():
            with through:
                outputs = module(inputs)
            logits, auxiliary = split_outputs(parts.recipe.model.arch, outputs)
        logits = logits[:num]

        def loss_of(logits: torch.Tensor) -> torch.Tensor:
            return mix.mean(functools.partial(parts.loss.sum, logits, training=True), labels, *weights)

        loss = loss_of(logits)
        total = loss + sum(weight * loss_of(o[:num]) for weight, o in auxiliary)
        weighted = self._state.scaler.scale(total * (parts.ranks.world_size / num_samples))
        return _Forward(weighted=weighted, loss=loss, logits=logits, labels=labels, mix=mix)

    def _of_one_image(self, num: int) -> AbstractContextManager[None]:
        """How the model takes a lone image, or what stands in for none."""
        model = self._parts.model
        if not self._parts.schedule.together:
            return model.fixed_statistics()
        return contextlib.nullcontext() if num else sync_batchnorm.standing_in(model.module)

    def _count(self, found: _Forward) -> torch.Tensor:
        loss = found.loss.detach()
        if len(found.labels):
            counts = count(loss, found.logits.detach(), found.labels, found.mix)
            for totals in (self._state.window_totals, self._state.epoch_totals):
                totals.add(counts)
        return loss

    def _exchange(self, *, sync: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if sync else self._parts.ddp.no_sync()


def _halves(num: int) -> list[int]:
    """Sizes of the pieces of a batch: the second is even, so that pairs of images that are mixed stay together.

    Of an even number the first is, too, so that none of theirs need be a lone image.
    """
    half = num // 2 + num % 2 * (num // 2 % 2)
    rest = half - half % 2 or 1  # two can be but 1 + 1
    return [num - rest, rest]


def _in_exchange(error: Exception, during: str = "DDP exchanged gradients") -> ExchangeMemoryError:
    said = " ".join(str(error).split())
    return ExchangeMemoryError(f"memory ran out while {during}, which cannot be done again: {said}")


def _can_be_smaller(error: Exception, batch: Batch) -> bool:
    return is_out_of_memory(error) and len(batch[1]) > 1
