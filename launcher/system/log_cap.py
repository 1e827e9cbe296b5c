"""Keeps what a rank writes into its log from filling the disk: a fault that repeats itself writes 80 MB a second."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

MAX_BYTES = 64 << 20
"""Bytes: cut a rank's log of one attempt that is longer. An ordinary log is a hundredth of this."""
HEAD_BYTES = 16 << 20
"""Bytes kept of its beginning, where the first failure is."""
TAIL_BYTES = 1 << 20
"""Bytes kept of its end."""
POLL_S = 1.0


class LogCap:
    """While entered, cuts the middle out of logs that have grown too long.

    Ranks write unbuffered, so that a crash in C code keeps its last words, and append, so that they go on at the new
    end of a log that was cut.

    Args:
        logs: gives the logs of this node's ranks; called again and again. Each node cuts only its own, because on NFS
            two nodes cannot append to one file.
    """

    def __init__(self, logs: Callable[[], Iterable[Path]]) -> None:
        self._logs = logs
        self._done = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="log-cap", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(POLL_S):
            for log in self._logs():
                with contextlib.suppress(OSError):  # a full disk, a file system that fails for a moment
                    cut(log)


def cut(log: Path) -> None:
    """Leave the beginning and the end of a log that is too long, and say so between them."""
    size = log.stat().st_size
    if size <= MAX_BYTES:
        return
    with log.open("rb") as file:
        file.seek(HEAD_BYTES)
        kept = HEAD_BYTES + len(file.readline(TAIL_BYTES))  # to the end of a line
        file.seek(-TAIL_BYTES, os.SEEK_END)
        tail = file.read(TAIL_BYTES)
    os.truncate(log, kept)
    note = f"\n--- {(size - kept - len(tail)) >> 20} MB were cut out here: a log has at most {MAX_BYTES >> 20} MB ---\n"
    with log.open("ab", buffering=0) as file:
        file.write(note.encode() + tail[tail.find(b"\n") + 1 :])
