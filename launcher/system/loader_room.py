"""What loader processes need (memory, and to hand batches over sockets, shared memory, open files), and how many fit.

If one of these runs out during training, a batch is lost and its rank waits for it for ever, or the kernel kills it.
"""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import resource
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from launcher.system import memory
from launcher.system.memory import FreeMemory

SHM = Path("/dev/shm")  # noqa: S108  its size is looked at, nothing is written
SHM_PART = 0.75
"""Use this fraction of the free /dev/shm; the rest is for NCCL and for other programs."""
MAX_FOLDER = 60
"""Characters of a folder for sockets. A socket's whole path has at most 107 (unix(7)), its name below takes 40."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108  only for a folder of mkdtemp's, which is ours alone
MAX_OPEN_FILES = 1 << 16
"""Raise the limit of open files to this at most: some programs loop over all numbers below the limit."""
SPARE_FILES = 32
"""Open files that a rank needs later: images, a checkpoint, tracking."""
FILES_OF_PROCESS = 4
"""Open files per loader process: two pipes, in the rank and in every loader process that is forked later."""
FILES_OF_BATCH = 4
"""Open files per batch in the process that made it: for images and labels, the shared memory and its handle."""
NUM_LOADERS = 2
"""Training and validation, each with processes of its own."""
BATCHES_IN_USE = 4
"""Batches in memory beside those in the queues: the current step's, the next steps', the one being made."""
MEMORY_PART = 0.5
"""Use this fraction of a rank's part of the machine's memory; the rest is for the rank itself and its checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is on this machine for the loader processes of one rank."""

    shm_bytes: int
    """Shared memory."""
    num_files: int
    """Files that a process can open, beyond those that it has open."""
    has_sockets: bool = True
    """Whether there is a folder for sockets."""
    memory: FreeMemory | None = None
    """The machine's memory for loading; None: not limited."""
    pinned: bool = False
    """Whether batches are copied to page-locked memory, from where a GPU takes them."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a rank loads its batches."""

    workers: int
    """Loader processes; 0: the rank itself."""
    prefetch: int
    """Batches that each makes ahead."""
    why: str | None = None
    """Why they are fewer than was wanted, and what to do; None: they are not."""


def make() -> None:
    """Make room for this process and those that it forks: raise the limit of open files, make a folder for sockets."""
    raise_open_files()
    _make_folder()


def prepare(num_ranks: int, *, pinned: bool = False) -> Room:
    """Make room and measure it; call this before loader processes are forked.

    Args:
        num_ranks: workers on this node, which share it.
        pinned: whether batches are copied to page-locked memory.
    """
    return Room(
        shm_bytes=int(free_shm() * SHM_PART / num_ranks),
        num_files=raise_open_files() - len(os.listdir("/proc/self/fd")),  # noqa: PTH208  only how many
        has_sockets=_make_folder(),
        memory=for_loading(num_ranks),
        pinned=pinned,
    )


def for_loading(num_ranks: int) -> FreeMemory:
    """The machine's memory that one of ``num_ranks`` workers may use to load batches."""
    free = memory.share(num_ranks)
    return FreeMemory(num_bytes=int(free.num_bytes * MEMORY_PART), limit=free.limit)


def most_samples(sample_bytes: int, room: FreeMemory) -> int:
    """The largest batch for a GPU that one loader process could load, one ahead; at least one."""
    copies = NUM_LOADERS + BATCHES_IN_USE + 2 * BATCHES_IN_USE  # page-locked memory may be twice as much
    return max(1, room.num_bytes // (copies * sample_bytes))


def fit(workers: int, prefetch: int, *, batch_bytes: int, room: Room) -> Loading:
    """As many loader processes as wanted and as there is room for; they prefetch less before they become fewer.

    Args:
        workers: wanted.
        prefetch: batches that each is to make ahead.
        batch_bytes: of a batch.
        room: what there is.
    """
    if not workers:
        return Loading(workers=0, prefetch=prefetch)
    why = "; ".join(_lacking(workers, prefetch, batch_bytes, room))
    for fewer in range(workers, 0, -1):
        for ahead in range(prefetch, 0, -1):
            if not _lacking(fewer, ahead, batch_bytes, room):
                return Loading(workers=fewer, prefetch=ahead, why=why or None)
    return Loading(workers=0, prefetch=prefetch, why=why)


def free_shm() -> int:
    """Bytes that are free in /dev/shm; 0 where there is none."""
    return shutil.disk_usage(SHM).free if SHM.is_dir() else 0


def raise_open_files() -> int:
    """Raise this process's limit of open files as far as it may; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def short_folder() -> str | None:
    """A folder in which a socket's path is short enough: TMPDIR or another; None: there is none."""
    with contextlib.suppress(FileNotFoundError):  # no folder is fit for temporary files
        usual = tempfile.gettempdir()
        if len(os.fsencode(usual)) <= MAX_FOLDER:
            return usual
    return next((folder for folder in SHORT_FOLDERS if os.access(folder, os.W_OK | os.X_OK)), None)


def _make_folder() -> bool:
    """Have multiprocessing make its folder for sockets where paths are short; processes that are forked inherit it."""
    folder, usual = short_folder(), tempfile.tempdir
    if folder is None:
        return False
    tempfile.tempdir = folder
    try:
        multiprocessing.util.get_temp_dir()
    except OSError:  # no room there
        return False
    finally:
        tempfile.tempdir = usual
    return True


def _num_files(workers: int, prefetch: int) -> int:
    """The most files that one process opens: the loader process that is forked last has the others' pipes too."""
    return NUM_LOADERS * FILES_OF_PROCESS * (workers + 1) + FILES_OF_BATCH * (prefetch + 1) + SPARE_FILES


def _shm_bytes(workers: int, prefetch: int, batch_bytes: int) -> int:
    return (NUM_LOADERS * workers * prefetch + BATCHES_IN_USE) * batch_bytes


def _memory_bytes(workers: int, prefetch: int, batch_bytes: int, *, pinned: bool) -> int:
    """Of the machine's memory: the batches in /dev/shm, and their page-locked copies.

    torch takes page-locked memory in powers of two.
    """
    locked = BATCHES_IN_USE * (1 << (batch_bytes - 1).bit_length()) if pinned and batch_bytes else 0
    return _shm_bytes(workers, prefetch, batch_bytes) + locked


def _lacking(workers: int, prefetch: int, batch_bytes: int, room: Room) -> list[str]:
    """What there is too little of, each with what to do."""
    found = []
    if not room.has_sockets:
        found.append("no folder for sockets can be written to; set TMPDIR to one with a short path")
    if (needed := _num_files(workers, prefetch)) > room.num_files:
        found.append(f"{room.num_files} files can be opened, {needed} are needed; raise the hard limit (ulimit -n)")
    needed = _memory_bytes(workers, prefetch, batch_bytes, pinned=room.pinned)
    if room.memory and needed > room.memory.num_bytes:
        found.append(
            f"{room.memory.num_bytes / 1e6:.0f} MB of memory are there to load with ({room.memory.limit}), "
            f"{needed / 1e6:.0f} MB are needed; ask for more memory, or lower batch.size"
        )
    if (needed := _shm_bytes(workers, prefetch, batch_bytes)) > room.shm_bytes:
        found.append(
            f"{room.shm_bytes / 1e6:.0f} MB of {SHM} are there for a rank, {needed / 1e6:.0f} MB are needed; start the "
            "container with --shm-size=8g or --ipc=host"
        )
    return found
