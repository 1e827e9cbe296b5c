"""How much memory this process can still take: the least that the machine, the job and control groups allow."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.system import control_groups

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from launcher.system.control_groups import ControlGroup

FREE_VARIABLE = "LAUNCH_FREE_MEMORY"
"""Environment variable of a worker, ``BYTES LIMIT``: the node's free memory before its workers began, and its limit."""
UNLIMITED = 1 << 60
"""Bytes. Control groups of version 1 show a limit above this where there is none."""
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("memory.max", "memory.current", ""),
}
"""Of each version of control groups: the files of a limit and of what is used, and how names in memory.stat begin."""


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """Memory that can still be taken."""

    num_bytes: int
    """How much."""
    limit: str
    """What limits it, in words."""

    def __str__(self) -> str:
        return f"{self.num_bytes} {self.limit}"

    @classmethod
    def parse(cls, text: str) -> FreeMemory:
        """Read what ``str`` gave."""
        num_bytes, _, limit = text.partition(" ")
        return cls(num_bytes=int(num_bytes), limit=limit)


def free(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> FreeMemory:
    """Memory that all processes here together can still take; reclaimable page cache counts as free.

    Args:
        root: where /proc and /sys are; another one in tests.
        environment: variables of this process; SLURM's give the job's memory.
    """
    found = [_machine(root), *_control_groups(root), *_job(environment)]
    return min(found, key=lambda one: one.num_bytes)


def share(num_workers: int, environment: Mapping[str, str] = os.environ) -> FreeMemory:
    """What this worker may still take: its part of what the machine, the job and its limits allow.

    Args:
        num_workers: of this node, which share it.
        environment: variables of this process; the supervisor has told what was free before its workers began.
    """
    told = environment.get(FREE_VARIABLE)
    found = FreeMemory.parse(told) if told else free()
    limit = found.limit if num_workers == 1 else f"{found.limit}, shared by {num_workers} workers"
    # A fork shares its parent's pages until it writes to them, as counting references does, little by little.
    own = status_bytes("RssAnon")
    shared = FreeMemory(num_bytes=max(0, found.num_bytes // num_workers - own), limit=limit)
    return min(shared, process_limit() or shared, key=lambda one: one.num_bytes)


def num_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed for lack of memory, in our control group or on this machine."""
    for group, *_ in control_groups.own("memory", root):
        counts = _counts(group.path / ("memory.events.local" if group.version == 2 else "memory.oom_control"))  # noqa: PLR2004
        if "oom_kill" in counts:
            return counts["oom_kill"]
    return _counts(root / "proc/vmstat").get("oom_kill", 0)


def process_limit() -> FreeMemory | None:
    """What this process can still take under ``ulimit -d`` and ``ulimit -v``; None: no limit."""
    found = []
    for kind, field, name in (
        (resource.RLIMIT_DATA, "VmData", "ulimit -d"),
        (resource.RLIMIT_AS, "VmSize", "ulimit -v"),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(FreeMemory(num_bytes=max(0, limit - status_bytes(field)), limit=name))
    return min(found, key=lambda one: one.num_bytes, default=None)


def status_bytes(field: str) -> int:
    """A size of this process as ``/proc/self/status`` has it: VmRSS, VmHWM (its peak), VmData, VmSize."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def _machine(root: Path) -> FreeMemory:
    lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return FreeMemory(num_bytes=values["MemAvailable"], limit="the machine's memory")


def _job(environment: Mapping[str, str]) -> Iterator[FreeMemory]:
    """What SLURM gave the job on this node (its variables are in MB). All of it is free: the job has just begun."""
    by_node, by_cpu = environment.get("SLURM_MEM_PER_NODE"), environment.get("SLURM_MEM_PER_CPU")
    cpus = environment.get("SLURM_CPUS_ON_NODE", "1")
    if by_node and by_node != "0":  # 0: all that the node has
        yield FreeMemory(num_bytes=int(by_node) << 20, limit="the job's --mem")
    elif by_cpu and by_cpu != "0":
        yield FreeMemory(num_bytes=(int(by_cpu) << 20) * int(cpus), limit="the job's --mem-per-cpu")


def _control_groups(root: Path) -> Iterator[FreeMemory]:
    """Every control group above this process that has a limit."""
    for groups in control_groups.own("memory", root):
        for group in groups:
            found = _limit_of(group)
            if found is not None:
                yield found


def _counts(file: Path) -> dict[str, int]:
    """The lines of a file, each a name and a number; empty where the file is missing."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name: int(number) for name, _, number in (line.partition(" ") for line in lines)}


def _limit_of(group: ControlGroup) -> FreeMemory | None:
    """What is left of a control group's limit; None: it has none."""
    limit, usage, prefix = FILES[group.version]
    try:
        most = int((group.path / limit).read_text(encoding="utf-8"))  # "max" raises ValueError
        used = int((group.path / usage).read_text(encoding="utf-8"))
        stat = (group.path / "memory.stat").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    if most >= UNLIMITED:
        return None
    values = dict(line.split() for line in stat)
    cache = sum(int(values.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return FreeMemory(num_bytes=max(0, most - (used - cache)), limit=f"the control group {group.path}")
