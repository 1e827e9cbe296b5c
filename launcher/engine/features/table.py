"""Where features are kept: memory or a file that a node's ranks share, and that goes with the last of them.

It has no name that a killed process could leave behind: the ranks open it through the process that made it, before
training goes on.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from launcher.system import memory as host_memory

if TYPE_CHECKING:
    from launcher.engine.features.cut import Cut

MEMORY_PART = 0.25
"""Features take this fraction of a node's free memory at most; the rest is for steps, loader processes, checkpoints."""
DISK_PART = 0.5
"""They take this fraction of what is free on a disk at most."""
IN_MEMORY_TYPES = ("tmpfs", "ramfs")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Made on a node's first rank, where the others find it."""

    path: str
    """By which they open it."""
    fd: int
    """Of the process that made it."""
    place: str
    """In words: memory, or the folder of the file."""


def make(num_bytes: int, *, on_disk: bool) -> Table:
    """Reserve room, all of it: a full disk says so now, and not when a page is written.

    Args:
        num_bytes: how much.
        on_disk: whether memory is short already.

    Raises:
        OSError: there is not so much; says how much there is.
    """
    free = host_memory.free()
    if not on_disk and num_bytes <= MEMORY_PART * free.num_bytes:
        fd, place = os.memfd_create("features", os.MFD_CLOEXEC), "memory"
    else:
        fd, place = _file(num_bytes, f"{_megabytes(free.num_bytes)} of memory ({free.limit})")
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        os.close(fd)
        raise OSError(f"{_megabytes(num_bytes)} in {place}: {error.strerror}") from error
    return Table(path=f"/proc/{os.getpid()}/fd/{fd}", fd=fd, place=place)


def open_table(path: str, cut: Cut, *, views: int, num_samples: int) -> torch.Tensor:
    """The shared numbers, views x samples x features of ``cut``."""
    size = views * num_samples * cut.num_features
    flat = torch.from_file(path, shared=True, size=size, dtype=cut.dtype)
    return flat.view(views, num_samples, cut.num_features)


def _file(num_bytes: int, memory: str) -> tuple[int, str]:
    folder = tempfile.gettempdir()
    free = 0 if _is_in_memory(Path(folder)) else shutil.disk_usage(folder).free
    if num_bytes > DISK_PART * free:
        raise OSError(
            f"they take {_megabytes(num_bytes)}; free are {memory} and {_megabytes(free)} on the disk of {folder} "
            f"(TMPDIR), of which {MEMORY_PART:.0%} and {DISK_PART:.0%} would be taken"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno()), folder


def _is_in_memory(folder: Path) -> bool:
    """Whether files in a folder take memory."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    above = [(len(at), kind) for _, at, kind, *_ in mounts if folder.is_relative_to(at)]
    return max(above, default=(0, ""))[1] in IN_MEMORY_TYPES


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
