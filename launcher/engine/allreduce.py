"""One all-reduce over some nodes, to see whether they reach each other (launcher.node.preflight)."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.engine.device import Device
from launcher.system.processes import die_with_parent

NUM_ELEMENTS = 2**20


def all_reduce(endpoint: str, rank: int, world_size: int, device: str, timeout_s: float) -> None:
    """Add up a tensor over the nodes of a group, as one process each; exits with 0 where the sum is right.

    Args:
        endpoint: ``HOST:PORT`` on the group's first node.
        rank: in the group.
        world_size: of the group.
        device: cuda (NCCL, the node's first GPU) or cpu (gloo).
        timeout_s: after which it has failed.
    """
    die_with_parent()
    own = Device(type=device, index=0)  # type: ignore[arg-type]  # the plan says cuda or cpu
    own.activate()
    dist.init_process_group(
        own.process_group_backend,
        init_method=f"tcp://{endpoint}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    values = torch.ones(NUM_ELEMENTS, device=own.torch_device)
    dist.all_reduce(values)
    os._exit(0 if bool((values == world_size).all()) else 1)
