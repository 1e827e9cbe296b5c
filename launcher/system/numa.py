"""Which cores and which memory are near to what (NUMA nodes), as sysfs says; and how a process keeps to them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PLACES_VARIABLE = "LAUNCH_PLACES"
"""By which a supervisor tells its workers their places, in the order of their local ranks; empty: none has one."""
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
"""Number of the system call; the C library has no function for it."""
GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}
MPOL_DEFAULT, MPOL_PREFERRED = 0, 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a worker computes."""

    cores: frozenset[int]
    """Those that it keeps to; others may keep to them too."""
    node: int | None
    """Number of the NUMA node whose memory it takes; None: any."""
    num_cores: int
    """How many of the cores are its own share."""
    threads: int
    """With how many it computes."""

    def __str__(self) -> str:
        """For a variable of the environment."""
        node = "" if self.node is None else self.node
        return f"{show_cores(self.cores)}/{node}/{self.num_cores}/{self.threads}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """What a variable of the environment says."""
        cores, node, num, threads = text.split("/")
        return cls(cores=parse_cores(cores), node=int(node) if node else None, num_cores=int(num), threads=int(threads))

    @classmethod
    def told(cls, local_rank: int) -> Self | None:
        """That of a worker of this node; None: it has none of its own."""
        text = os.environ.get(PLACES_VARIABLE)
        return cls.parse(text.split(";")[local_rank]) if text else None

    def take(self) -> None:
        """Have this process, its threads to come and its children keep to the place."""
        os.sched_setaffinity(0, self.cores)
        os.environ["OMP_NUM_THREADS"] = str(self.threads)
        if self.node is not None:
            prefer_memory_of(self.node)


def parse_cores(text: str) -> frozenset[int]:
    """The kernel's form: ``0-3,8``."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def show_cores(cores: Iterable[int]) -> str:
    """The same, written."""
    ranges: list[list[int]] = []
    for core in sorted(cores):
        if ranges and core == ranges[-1][1] + 1:
            ranges[-1][1] = core
        else:
            ranges.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def nodes(root: Path) -> dict[int, frozenset[int]]:
    """Cores of each NUMA node of this machine that has some.

    Args:
        root: where /sys is; another one in tests.
    """
    files = (root / "sys/devices/system/node").glob("node[0-9]*/cpulist")
    found = {int(file.parent.name.removeprefix("node")): parse_cores(_read(file)) for file in files}
    return {number: cores for number, cores in sorted(found.items()) if cores}


def near_device(pci_address: str, root: Path) -> tuple[int | None, frozenset[int]]:
    """NUMA node and cores that are near to a device; None and none where the machine does not say.

    Args:
        pci_address: as NVIDIA's tools (``00000000:3B:00.0``) or sysfs (``0000:3b:00.0``) write it.
        root: where /sys is.
    """
    domain, _, rest = pci_address.strip().lower().partition(":")
    device = root / "sys/bus/pci/devices" / f"{domain[-4:]}:{rest}"
    number = _read(device / "numa_node").strip()
    if not number.isdigit():  # -1: there is only one, or the firmware does not say
        return None, frozenset()
    return int(number), parse_cores(_read(device / "local_cpulist")) or nodes(root).get(int(number), frozenset())


def prefer_memory_of(node: int) -> None:
    """Take memory of a NUMA node as long as it has some, unless this process was started with another policy (numactl).

    Where that is not allowed, as in some containers, the first core to touch a page decides, which comes to the same.
    """
    machine, call = platform.machine(), ctypes.CDLL(None, use_errno=True).syscall
    if machine not in SET_MEMPOLICY:
        return
    mode = ctypes.c_int(-1)
    call(GET_MEMPOLICY[machine], ctypes.byref(mode), None, ctypes.c_ulong(0), None, ctypes.c_ulong(0))
    if mode.value != MPOL_DEFAULT:
        return
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (node // bits + 1))()
    mask[node // bits] = 1 << node % bits
    # One more than the bits there are: the kernel takes off one.
    call(SET_MEMPOLICY[machine], MPOL_PREFERRED, mask, ctypes.c_ulong(len(mask) * bits + 1))


def _read(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="ascii")
    return ""
