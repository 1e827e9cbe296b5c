"""The process group of a run, and how its ranks agree to stop at one step without waiting for each other."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.runs.generations import NODE_VARIABLE
from launcher.runs.heartbeats import JOINING, MEETING, group_timeout_s
from launcher.runs.run_dir import ATTEMPT_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from launcher.engine.device import Device

HERE, ALL_HERE = "launcher/here", "launcher/all-here"
"""Keys of the store: how many ranks have come, and that all have."""
MEET_FIRST_S, MEET_MOST_S = 0.01, 0.5
"""Between two looks: most ranks come together, and a thousand that wait for one must not crowd the store."""
LATE_S = 1800.0
"""How much later than another a rank may come; measuring batch sizes takes minutes."""
ANSWER_S = 5.0
"""How long a machine gets to answer."""
BROADCAST_BYTES = 250 << 20
"""Of one exchange of buffers, at most; DDP's own number."""
NUM_RECORDED = 2000
"""Collectives that NCCL's flight recorder keeps; torch's own documentation takes as many."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who this process is among the run's workers."""

    rank: int = 0
    """Among all workers, from 0."""
    local_rank: int = 0
    """On this node, from 0."""
    local_world_size: int = 1
    """Workers on this node."""
    world_size: int = 1
    """Workers of the run."""
    node_rank: int = 0
    """Which node, from 0."""

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read torchrun's environment variables; without them this is the only worker."""
        names = {
            "rank": "RANK",
            "local_rank": "LOCAL_RANK",
            "local_world_size": "LOCAL_WORLD_SIZE",
            "world_size": "WORLD_SIZE",
            "node_rank": NODE_VARIABLE if NODE_VARIABLE in os.environ else "GROUP_RANK",
        }
        return cls(**{field: int(os.environ[name]) for field, name in names.items() if name in os.environ})


def record_collectives(dump: Path, pipe: Path, hang_timeout_s: float | None) -> None:
    """Have NCCL's flight recorder keep the last collectives, and write them down on a timeout or when it is asked to.

    torch's own monitor of NCCL is to wait longer than the watchdog: it ends a worker that hangs in CUDA without a word.

    Args:
        dump: beginning of the names of its files.
        pipe: beginning of the names of the pipes through which it is asked.
        hang_timeout_s: of the recipe.
    """
    values = {
        "TORCH_FR_BUFFER_SIZE": NUM_RECORDED,
        "TORCH_NCCL_TRACE_BUFFER_SIZE": NUM_RECORDED,  # its older name, and that of the file
        "TORCH_FR_DUMP_TEMP_FILE": dump,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": dump,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": pipe,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": 1,
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": int(group_timeout_s(hang_timeout_s)),
    }
    for name, value in values.items():
        os.environ.setdefault(name, str(value))


def init_process_group(
    device: Device,
    ranks: Ranks,
    *,
    hang_timeout_s: float | None = None,
    at: Callable[[str], None] = lambda _: None,
) -> None:
    """Join the run's process group; a single worker without an agent gets one of its own, so there is one road.

    Args:
        device: where this rank computes.
        ranks: who it is.
        hang_timeout_s: of the recipe; the watchdog, which knows what each worker was doing, is to go before torch.
        at: told what this rank is about to do, and again each second where it waits for a rank that comes late.
    """
    timeout = timedelta(seconds=group_timeout_s(hang_timeout_s))
    options: dict[str, Any] = {"device_id": device.torch_device} if device.is_cuda else {}
    at(MEETING)
    store = _meet(ranks, timeout, at)
    at(JOINING)
    options |= {"rank": ranks.rank, "world_size": ranks.world_size}
    dist.init_process_group(device.process_group_backend, store=store, timeout=timeout, **options)


def _meet(ranks: Ranks, timeout: timedelta, at: Callable[[str], None]) -> dist.Store:
    """Wait until all ranks are here; return the store by which they form their process group."""
    alive = functools.partial(at, MEETING)
    store = agents_store(ranks, alive, timeout)
    if store is None:
        return dist.HashStore()
    if store.add(HERE, 1) == ranks.world_size:
        store.set(ALL_HERE, "")
    _wait(lambda: store.check([ALL_HERE]), timeout, alive)
    return dist.PrefixStore("default_pg", store)


def agents_store(
    ranks: Ranks, alive: Callable[[], object], timeout: timedelta = timedelta(seconds=LATE_S)
) -> dist.Store | None:
    """The store of this attempt, where ranks can meet before they join the process group; None: there is no agent.

    torch would wait in C code for all ranks to open it, where this one could neither heed a stop nor say that it lives.
    The agent may keep the store when it starts the workers again: what they left there is nothing to the next attempt.

    Args:
        ranks: who this is.
        alive: called again and again while nobody serves it yet; may raise.
        timeout: for that, and for answers.
    """
    if "MASTER_ADDR" not in os.environ:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _wait(lambda: _listens(host, port), timeout, alive)
    store = _open_store(host, port, serves=serves)
    store.set_timeout(timeout)
    return dist.PrefixStore(f"attempt-{os.environ.get(ATTEMPT_VARIABLE)}", store)


@functools.cache
def _open_store(host: str, port: int, *, serves: bool) -> dist.TCPStore:
    """Opened once: where the agent does not share its store, rank 0 serves it for as long as it keeps it."""
    return dist.TCPStore(host, port, is_master=serves, wait_for_workers=False)


def _wait(is_ready: Callable[[], bool], timeout: timedelta, alive: Callable[[], object]) -> None:
    """Wait for ranks that come late.

    One may be measuring its batch size; if it hangs, the watchdog of its own node finds it. So this one says that it
    lives; but not where a machine does not answer, nor for ever.
    """
    start, pause_s = time.monotonic(), MEET_FIRST_S
    while True:
        waited = time.monotonic() - start
        with contextlib.suppress(OSError):
            if is_ready():
                return
            if waited < LATE_S:
                alive()
        if waited > timeout.total_seconds():
            raise dist.DistStoreError(f"after {waited:.0f} s not all workers have come together")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, MEET_MOST_S)


def _listens(host: str, port: int) -> bool:
    """Whether somebody listens there. Raises OSError where the machine does not answer."""
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except ConnectionRefusedError:
        return False
    return True


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Add ``tensor`` up over all ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The largest over all ranks, in place."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def any_rank(said: bool, device: torch.device) -> bool:  # noqa: FBT001
    """Whether any rank says so."""
    return bool(max_over_ranks(torch.tensor(int(said), device=device)))


def count_over_ranks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values (int64) of all ranks that occur, ascending, and how often each does."""
    own, counts = torch.unique(values, return_counts=True)
    longest = int(max_over_ranks(torch.tensor(len(own), device=own.device)))
    padded = torch.stack([torch.nn.functional.pad(each, (0, longest - len(own))) for each in (own, counts)])
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, padded)
    every, times = torch.cat(gathered, dim=1)
    every, times = every[times > 0], times[times > 0]
    found, places = torch.unique(every, return_inverse=True)
    return found, torch.zeros_like(found).index_add_(0, places, times)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, each of which may have another number of them, in the order of the ranks."""
    num = torch.tensor([len(rows)], device=rows.device)
    every = [torch.empty_like(num) for _ in range(dist.get_world_size())]
    dist.all_gather(every, num)
    sizes = torch.cat(every).tolist()  # all at once: the host waits for the GPU a single time
    padded = (
        rows if len(rows) == max(sizes) else torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
    )
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded.contiguous())
    return torch.cat([found[:size] for found, size in zip(gathered, sizes, strict=True)])


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give every rank the buffers (BatchNorm statistics) of rank 0, which are the ones a checkpoint holds."""
    if buffers := list(module.buffers()):  # in a few exchanges, as DDP does it; resnet50 has 161 of them
        group = dist.distributed_c10d._get_default_group()  # noqa: SLF001
        dist._broadcast_coalesced(group, buffers, BROADCAST_BYTES, 0)  # noqa: SLF001


def are_everywhere_the_same(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether every rank has the very same tensors, on the host: their digests are exchanged, not they themselves."""
    digest = hashlib.sha256()
    for tensor in tensors:
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)  # as it lies in memory: no copy is made
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} {order}".encode())
        content: Any = tensor.detach().permute(order).contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(content)
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return all(torch.equal(own, one) for one in found)


class Agreement:
    """Wishes of single ranks (stop, save) that all ranks act upon at the same step.

    :meth:`propose` starts an asynchronous all-reduce of a few integers on the host (gloo, in a group of its own, so it
    neither waits for the GPU nor queues with gradients); :meth:`collect`, a step later, returns what any rank wished:
    by then it has long arrived, and it is the same on every rank.

    Args:
        num_wishes: how many kinds of wishes there are.
        hang_timeout_s: of the recipe.
    """

    def __init__(self, num_wishes: int, hang_timeout_s: float | None = None) -> None:
        timeout = timedelta(seconds=group_timeout_s(hang_timeout_s))
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout)
        """All ranks, on the host."""
        self._num_wishes = num_wishes
        self._pending: tuple[torch.Tensor, Any] | None = None

    def propose(self, *wishes: bool) -> None:
        """Say what this rank wishes now. Every rank must, after a :meth:`collect`."""
        flags = torch.tensor([int(w) for w in wishes], dtype=torch.int32)
        work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        self._pending = (flags, work)

    def gather(self, number: int) -> list[int]:
        """The numbers of all ranks. Every rank must call it, after a :meth:`collect` and before a :meth:`propose`."""
        found = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(found, torch.tensor(number), group=self.group)
        return [int(one) for one in found]

    def collect(self) -> tuple[bool, ...]:
        """What any rank wished at the last :meth:`propose`."""
        if self._pending is None:
            return (False,) * self._num_wishes
        flags, work = self._pending
        self._pending = None
        work.wait()
        return tuple(bool(flag) for flag in flags.tolist())
