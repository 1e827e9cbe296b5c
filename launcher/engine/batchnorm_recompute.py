"""BatchNorm's running statistics, computed anew before a validation: those of the very weights that are validated.

They are a moving average over the last 1 / momentum passes or so. After few passes that is still mostly what it began
with, and while the weights move fast it lags behind them: a model that is right with batch statistics then validates,
and is exported, with wrong ones. So they are made the mean of means and variances over training batches, of all ranks
(Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576: PreciseBN).

The result follows from weights, recipe and epoch alone, whatever the statistics were before: a resumed run comes to the
same bits. Training goes on with it, and a checkpoint holds it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from launcher.engine.distributed import sum_over_ranks
from launcher.engine.layers import batch_norms
from launcher.engine.network.sync_batchnorm import SyncBatchNorm
from launcher.recipe import phases
from launcher.system.phases import during

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.engine.layers import BatchNorm
    from launcher.engine.listeners.recorder import Recorder
    from launcher.engine.setup import Parts

AUTO_BATCHES = 100
"""With auto, batches of all ranks together. About what 40 to 60 training batches take (CPU)."""
AUTO_PASSES = 10.0
"""With auto, statistics are computed anew until so many times 1 / momentum steps have been taken."""


class BatchNormRecompute:
    """Every rank has one, and calls it at the same steps.

    Args:
        parts: what is trained.
        recorder: on rank 0.
        keep: has the features of an epoch's training images, where they are kept: a run that was stopped right before
            has lost them, and comes to the same bits only by them.
    """

    def __init__(self, parts: Parts, recorder: Recorder | None, *, keep: Callable[[int], None]) -> None:
        self._parts = parts
        self._recorder = recorder
        self._keep = keep
        self._told = False

    def run(self, *, epoch: int, step: int, poll: Callable[[], None], of_mean: bool = False) -> None:
        """Compute the statistics of the layers that learn, where the recipe says so; leave the model in eval mode.

        Args:
            epoch: the one that ends, from 0.
            step: optimizer steps done.
            poll: called before each batch; may raise, and nothing has changed then.
            of_mean: the weights are a mean of those of many steps: with auto, too, the statistics are computed anew.
        """
        parts, start = self._parts, time.monotonic()
        parts.model.train()
        layers = [layer for layer in batch_norms(parts.model.module) if layer.training and layer.track_running_stats]
        most = self._num_batches(layers, epoch, of_mean=of_mean)
        batches = parts.schedule.statistics_batches(parts.ranks.rank, epoch=epoch, most=most)
        if not layers or not batches:
            parts.model.eval()
            return
        self._keep(epoch)
        parts.model.eval()
        num = _compute(parts, layers, epoch, batches, poll)
        if self._recorder:
            seconds = time.monotonic() - start
            fields = {"batches": num, "batch_size": len(batches[0]), "seconds": round(seconds, 3)}
            self._recorder.event("batchnorm_recomputed", epoch=epoch, step=step, **fields)
            if not self._told and not of_mean:
                self._told = True
                self._recorder.say(
                    f"epoch {epoch + 1}: BatchNorm's running statistics were computed anew from {num} training batches "
                    f"of {len(batches[0])}, in {seconds:.1f} s: the moving average is of too few steps yet "
                    "(train.batchnorm_recompute)"
                )

    def _num_batches(self, layers: Sequence[BatchNorm], epoch: int, *, of_mean: bool) -> int:
        """How many batches of all ranks to compute from; 0: the running average will do."""
        recipe = self._parts.recipe
        if recipe.train.batchnorm_recompute != "auto":
            wanted = recipe.train.batchnorm_recompute
        else:
            began = phases.phase_at(recipe, epoch).start
            steps = (epoch + 1 - began) * self._parts.schedule.steps_per_epoch
            few = any(layer.momentum is None or steps * layer.momentum < AUTO_PASSES for layer in layers)
            wanted = AUTO_BATCHES if few or of_mean else 0
        return wanted if self._parts.max_steps is None else min(wanted, self._parts.max_steps)


class _Sums:
    """Of the means and variances of each layer's inputs, by a hook before its forward pass."""

    def __init__(self, layers: Sequence[BatchNorm], device: torch.device) -> None:
        # For each layer: means, variances, and the passes that they are of (a head that only training has sees none).
        # Where training takes all ranks' images together, a rank's part is too small for its variance to be theirs:
        # there what is summed up is the mean square, so that what the parts' means differ by counts.
        self._of = {
            layer: torch.zeros(2 * layer.num_features + 1, dtype=torch.float64, device=device) for layer in layers
        }

    def add(self, layer: BatchNorm, inputs: tuple[torch.Tensor]) -> None:
        """Count a batch (N x C x ...)."""
        values = inputs[0].float()
        is_square = isinstance(layer, SyncBatchNorm)
        others = [d for d in range(values.dim()) if d != 1]
        variance, mean = torch.var_mean(values, dim=others, correction=0 if is_square else 1)
        mean, variance = mean.double(), variance.double()
        if is_square:
            variance += mean**2
        self._of[layer] += torch.cat([mean, variance, mean.new_ones(1)])

    def hand_over(self) -> int:
        """Make the means over all ranks the layers' running statistics; return of how many batches they are."""
        every = sum_over_ranks(torch.cat(list(self._of.values())))
        parts = torch.split(every, [len(sums) for sums in self._of.values()])
        for layer, sums in zip(self._of, parts, strict=True):
            if sums[-1] > 0:
                mean, variance = (sums[:-1] / sums[-1]).chunk(2)
                layer.get_buffer("running_mean").copy_(mean)
                is_square = isinstance(layer, SyncBatchNorm)
                layer.get_buffer("running_var").copy_(variance - mean**2 if is_square else variance)
        return int(max(sums[-1] for sums in parts))


@torch.no_grad()
def _compute(
    parts: Parts, layers: Sequence[BatchNorm], epoch: int, batches: list[list[int]], poll: Callable[[], None]
) -> int:
    """Make the running statistics of ``layers`` the mean over the batches of all ranks; return how many these are.

    All else is in eval mode, as it will be in validation: nothing is random. The layers normalise by batch statistics,
    and their buffers stay as they are until all is done: a stop or a checkpoint in the middle finds them whole.
    """
    kept = parts.kept if parts.kept and not parts.kept.cut.rest_trains else None
    network = kept.rest if kept else parts.model.module
    sums = _Sums(layers, parts.device.torch_device)
    hooks = [layer.register_forward_pre_hook(sums.add) for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        with during("computing BatchNorm's statistics, training batch") as show:
            for number, batch in enumerate(parts.statistics_loader(epoch, batches, kept)):
                poll()
                show(number + 1, len(batches))
                inputs, labels = (kept or parts).to_device(batch)
                if len(labels):
                    with parts.autocast():
                        network(inputs)
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            layer.training, layer.track_running_stats = False, True
            hook.remove()
    return sums.hand_over()
