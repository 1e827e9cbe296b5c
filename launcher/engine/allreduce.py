"""All-reduces over the workers of some nodes, to see whether and how fast they reach each other (node.preflight)."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.engine.device import Device
from launcher.errors import EXIT_FAILED
from launcher.system.processes import die_with_parent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

MIB = 2**20
SIZES_MIB = {"cpu": (4, 64), "cuda": (4, 64, 256)}
"""What is added up, small ones first; the last is measured. Buckets of gradients have 25 MiB, models hundreds."""
MEASURE_S, MOST_TIMES = 2.0, 20
"""How long, and how often at most, the last size is added up; once at least."""


def all_reduce(
    endpoint: str,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    device: str,
    timeout_s: float,
    tell: Connection,
) -> None:
    """Add up tensors with the other workers of a group of nodes, and those of this node; tell how fast that went.

    Then this process waits for its end: another may still need it.

    Args:
        endpoint: ``HOST:PORT`` on the group's first node.
        rank: in the group.
        world_size: of the group.
        local_rank: on this node.
        local_world_size: workers on each node.
        device: cuda (NCCL, the GPU of the local rank) or cpu (gloo).
        timeout_s: after which it has failed.
        tell: takes ``{all_gb_s, within_gb_s}``, each None where it is alone; nothing comes where it has failed.
    """
    die_with_parent()
    own = Device(type=device, index=local_rank)  # type: ignore[arg-type]  # the plan says cuda or cpu
    own.activate()
    dist.init_process_group(
        own.process_group_backend,
        init_method=f"tcp://{endpoint}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    first = rank - local_rank
    here = dist.new_group(list(range(first, first + local_world_size)), use_local_synchronization=True)
    within = _gb_per_s(own, here)
    tell.send({"within_gb_s": within, "all_gb_s": within if local_world_size == world_size else _gb_per_s(own, None)})
    time.sleep(timeout_s)
    os._exit(EXIT_FAILED)


def _gb_per_s(device: Device, group: Any) -> float | None:
    """GB/s that each member of a group sends, as nccl-tests counts them (bus bandwidth); None: it has only this one."""
    num, sizes = dist.get_world_size(group), SIZES_MIB[device.type]
    _time(device, group, sizes[0])  # makes the connections
    for size in sizes:
        seconds = _time(device, group, size)
        if seconds > MEASURE_S:
            break  # on such a network larger ones take minutes
    if num == 1:
        return None
    times = max(1, min(MOST_TIMES, int(MEASURE_S / seconds)))
    seconds = sum(_time(device, group, size) for _ in range(times)) / times
    return 2 * (num - 1) / num * size * MIB / seconds / 1e9


def _time(device: Device, group: Any, size_mib: int) -> float:
    """Seconds that an all-reduce takes on the slowest member of a group; the same on all."""
    values = torch.ones(size_mib * MIB // 4, device=device.torch_device)
    device.synchronize()
    start = time.monotonic()
    dist.all_reduce(values, group=group)
    device.synchronize()
    seconds = torch.tensor(time.monotonic() - start, device=device.torch_device)
    num = dist.get_world_size(group)
    if not bool((values == num).all()):
        raise ArithmeticError(f"an all-reduce of {size_mib} MiB over {num} workers gives wrong sums")
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    return max(seconds.item(), 1e-9)
