"""``model.sync_batchnorm``: BatchNorm by the images of all ranks together.

torch's own (2.14) has kernels for GPUs alone, and counts what stands in for the images of a rank that has none. This
one computes the same on any device: each rank hands on how many values it has, their mean and their variance, and the
backward pass adds up two sums over the ranks. Every rank must take part in every pass, so all take a step in as many
parts (``Schedule.together``).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from launcher.engine.layers import BatchNorm

if TYPE_CHECKING:
    from collections.abc import Iterator


REPLACED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The very classes that ours takes the place of: what a class made from them adds would be lost."""


class SyncBatchNorm(BatchNorm):
    """As the layer that it takes the place of, but that in training all ranks' values count.

    Without running statistics, as while these are computed anew, it is of this rank's own values.
    """

    counts = True
    """Whether this rank's values are counted; not where they only stand in for images that it does not have."""

    @classmethod
    def of(cls, layer: BatchNorm) -> SyncBatchNorm:
        """The same layer with the same parameters and buffers."""
        made = cls(layer.num_features, layer.eps, layer.momentum, affine=False, track_running_stats=False)
        made.affine, made.track_running_stats, made.training = layer.affine, layer.track_running_stats, layer.training
        made._parameters, made._buffers = layer._parameters, layer._buffers  # noqa: SLF001
        return made

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002  torch's name
        """Of any number of dimensions, as torch's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  torch's name
        """Normalise N x C x ...; in training by all ranks' values."""
        if not (self.training and self.track_running_stats):
            return super().forward(input)
        found = _Normalise.apply(input, self.weight, self.bias, self.eps, self.counts)
        output, mean, variance, num = found
        self._follow(mean, variance, num)
        return output  # type: ignore[no-any-return]

    @torch.no_grad()
    def _follow(self, mean: torch.Tensor, variance: torch.Tensor, num: torch.Tensor) -> None:
        """Move the running statistics, by the unbiased variance, as torch does."""
        assert self.num_batches_tracked is not None  # noqa: S101
        self.num_batches_tracked.add_(1)
        part: Any = 1.0 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
        unbiased = variance * (num / (num - 1).clamp(min=1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            assert running is not None  # noqa: S101
            running.mul_(1.0 - part).add_(new.to(running.dtype) * part)


class _Normalise(torch.autograd.Function):
    """The output, and the mean, the biased variance and the number of all ranks' values of a channel."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        counts: bool,  # noqa: FBT001
    ) -> tuple[torch.Tensor, ...]:
        exact = values if values.dtype == torch.float64 else values.float()
        variances, means = torch.var_mean(exact, dim=_but_channels(values), correction=0)
        num = means.new_full((1,), values.numel() / values.shape[1] if counts else 0.0)
        own = torch.cat([num, means, variances])
        every = own.new_empty(dist.get_world_size(), len(own))
        dist.all_gather(list(every.unbind(0)), own)
        nums, means, variances = torch.split(every, [1, values.shape[1], values.shape[1]], dim=1)
        total = nums.sum()
        mean = (nums * means).sum(0) / total
        variance = (nums * (variances + (means - mean) ** 2)).sum(0) / total
        output = functional.batch_norm(values, mean, variance, weight, bias, training=False, eps=eps)
        scale = torch.rsqrt(variance + eps)
        ctx.counts = counts
        ctx.save_for_backward(values, weight, mean, scale, total)
        ctx.mark_non_differentiable(mean, variance, total)
        return output, mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        values, weight, mean, scale, total = ctx.saved_tensors
        others, shape = _but_channels(values), [1, -1] + [1] * (values.dim() - 2)
        exact = gradient.to(mean.dtype)
        normal = (values.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        sums = torch.stack([exact.sum(others), (exact * normal).sum(others)])
        own = sums.clone()
        dist.all_reduce(sums)
        if ctx.counts:
            exact = exact - (sums[0].view(shape) + normal * sums[1].view(shape)) / total
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        of_values = (exact * factor.view(shape)).to(values.dtype)
        if weight is None:
            return of_values, None, None, None, None
        return of_values, own[1].to(weight.dtype), own[0].to(weight.dtype), None, None


def _but_channels(values: torch.Tensor) -> list[int]:
    return [dim for dim in range(values.dim()) if dim != 1]


def synchronise(module: nn.Module) -> bool:
    """Put such layers in the place of a network's BatchNorm layers; return whether there are any."""
    if type(module) in REPLACED:
        raise TypeError("a network that is one BatchNorm layer has nothing to hold another")
    found = False
    for name, child in module.named_children():
        if isinstance(child, BatchNorm) and type(child) in REPLACED:
            setattr(module, name, SyncBatchNorm.of(child))
            found = True
        else:
            found |= synchronise(child)
    return found


def others(module: nn.Module) -> list[str]:
    """Names of the BatchNorm layers of a network that cannot be synchronised, being of a class of their own."""
    return [
        name for name, layer in module.named_modules() if isinstance(layer, BatchNorm) and type(layer) not in REPLACED
    ]


@contextlib.contextmanager
def standing_in(module: nn.Module) -> Iterator[None]:
    """While a rank without images takes part in a pass with something that stands in for them."""
    layers = [layer for layer in module.modules() if isinstance(layer, SyncBatchNorm)]
    for layer in layers:
        layer.counts = False
    try:
        yield
    finally:
        for layer in layers:
            layer.counts = True
