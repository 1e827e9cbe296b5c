"""BatchNorm's running statistics, which a forward pass changes: handed on and put back all in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from launcher.engine.layers import batch_norms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


class RunningStatistics:
    """Those of a whole model. Its buffers become views of one tensor for each dtype, whose names and shapes stay.

    Args:
        module: the model, on its device.
    """

    def __init__(self, module: nn.Module) -> None:
        owned = [
            (layer, name, buffer)
            for layer in batch_norms(module)
            for name, buffer in layer.named_buffers(recurse=False)
        ]
        self._flat: list[torch.Tensor] = []
        for dtype in {buffer.dtype: None for _, _, buffer in owned}:
            group = [(layer, name, buffer) for layer, name, buffer in owned if buffer.dtype == dtype]
            flat = torch.cat([buffer.reshape(-1) for _, _, buffer in group])
            parts = torch.split(flat, [buffer.numel() for _, _, buffer in group])
            for (layer, name, buffer), part in zip(group, parts, strict=True):
                setattr(layer, name, part.view(buffer.shape))
            self._flat.append(flat)

    def broadcast(self) -> None:
        """Give every rank those of rank 0, which are the ones a checkpoint holds."""
        for flat in self._flat:
            dist.broadcast(flat, src=0)

    def copy(self) -> list[torch.Tensor]:
        """As they are now, for :meth:`put_back`."""
        return [flat.clone() for flat in self._flat]

    def restore(self, copied: Sequence[torch.Tensor]) -> None:
        """Make them what they were."""
        for flat, before in zip(self._flat, copied, strict=True):
            flat.copy_(before)

    def put_back(self, copied: Sequence[torch.Tensor], *, where: torch.Tensor) -> None:
        """Make them what they were, if ``where`` (a number on the device) is not 0; nobody waits for it."""
        for flat, before in zip(self._flat, copied, strict=True):
            flat.copy_(torch.where(where != 0, before, flat))
