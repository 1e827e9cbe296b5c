"""glibc's allocator: have a process keep the memory that it frees.

A step on a CPU frees what it has allocated. By default glibc gives every large block back to the kernel, which clears
its pages anew for the next step: up to 40 % of the time of a step. What is kept is what a step needs at its peak.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from multiprocessing.connection import Connection

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Has torch ask for huge pages for its large tensors, where the kernel grants them on request (madvise)."""
OWN_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Environment variables by which the user has set the allocator; glibc heeds them when a process starts."""
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = -1
"""As M_TRIM_THRESHOLD: never give the top of the heap back."""


def why_not(environment: Mapping[str, str] = os.environ) -> str:
    """Why this process's allocator is left as it is, in words; empty: it can keep what is freed."""
    own = [name for name in OWN_SETTINGS if name in environment]
    if own or "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return f"{own[0] if own else 'GLIBC_TUNABLES'} is set, and is left alone"
    if "malloc" in environment.get("LD_PRELOAD", ""):
        return f"LD_PRELOAD={environment['LD_PRELOAD']} brings another allocator"
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        return "this system's C library is not glibc"
    return ""


def keep_freed() -> bool:
    """Have this process, and those that it forks, keep the memory that they free; return whether they do.

    Blocks come from the heap and not from maps of their own (``M_MMAP_MAX``), and the heap is not trimmed
    (``M_TRIM_THRESHOLD``): mallopt(3).
    """
    if why_not():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def time_reuse(*, keep: bool, num_bytes: int = 128 << 20, rounds: int = 5) -> float:
    """Seconds to take, fill and free a block, as tensors of a step are; the least of some rounds, in a child.

    Args:
        keep: whether the child keeps what it frees.
        num_bytes: of the block.
        rounds: after a first one that counts for nothing.
    """
    import multiprocessing

    ours, theirs = multiprocessing.Pipe(duplex=False)
    arguments = (theirs, keep, num_bytes, rounds)
    child = multiprocessing.get_context("fork").Process(target=_time_reuse, args=arguments)
    child.start()
    theirs.close()
    try:
        return float(ours.recv())
    finally:
        child.join()


def _time_reuse(answer: Connection, keep: bool, num_bytes: int, rounds: int) -> None:  # noqa: FBT001  of a process
    if keep:
        keep_freed()
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    took = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        block = library.malloc(num_bytes)
        ctypes.memset(block, 1, num_bytes)
        library.free(block)
        took.append(time.perf_counter() - start)
    answer.send(min(took[1:]))
