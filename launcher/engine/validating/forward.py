"""Images through a network in evaluation; in parts where memory runs out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from launcher.engine.device import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.engine.device import Device, Precision

    Network = Callable[[torch.Tensor], torch.Tensor]


def logits_of(network: Network, images: torch.Tensor, device: Device, precision: Precision) -> torch.Tensor:
    """Logits N x C, in one go where there is the memory.

    Args:
        network: in evaluation mode; its answer is on the device.
        images: what it takes, N x anything.
        device: where it computes.
        precision: of the forward pass.
    """
    size = len(images)
    while (logits := _in_parts(network, images, size, device, precision)) is None:  # what failed is let go of by now
        device.release_memory()
        size = (size + 1) // 2
    return logits


def _in_parts(
    network: Network,
    images: torch.Tensor,
    size: int,
    device: Device,
    precision: Precision,
) -> torch.Tensor | None:
    """The logits, of ``size`` images at once; None where memory ran out for more than one."""
    try:
        with device.autocast(precision):
            parts = [network(part) for part in torch.split(images, size)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    except Exception as error:
        if size == 1 or not is_out_of_memory(error):
            raise
        return None
