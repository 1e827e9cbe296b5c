"""How far a tracker has come with a run, kept in the run directory; and that only one tracks it at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from typing import TYPE_CHECKING, Any, Self

from launcher.errors import UsageError
from launcher.runs.run_dir import node_name
from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir

LOCK_S = 5.0
"""Wait so long for another tracker, which may be about to end."""


class TakenError(UsageError):
    """Another process tracks the run already."""


class Place:
    """``tracking/SINK.json``, held by one process at a time.

    Args:
        run: the run directory.
        sink: whose.
        wait_s: seconds to wait for another tracker.
    """

    def __init__(self, run: RunDir, sink: str, *, wait_s: float = LOCK_S) -> None:
        self._run = run
        self._sink = sink
        self._path = run.tracked(sink)
        self._wait_s = wait_s
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Take it.

        Raises:
            TakenError: another process has it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        path = self._path.with_suffix(".lock")
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        until = time.monotonic() + self._wait_s
        while not _locked(self._lock):
            if time.monotonic() > until:
                with contextlib.suppress(OSError):
                    by = path.read_text(encoding="utf-8").strip()
                os.close(self._lock)
                raise TakenError(f"{self._sink}: {self._run} is tracked already, by {by or 'another process'}")
            time.sleep(0.1)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {node_name()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave it to others."""
        if self._lock is not None:
            os.close(self._lock)  # which frees the lock, as the end of the process does

    def read(self) -> dict[str, Any]:
        """What was written last; empty where there is nothing, or half of something."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, **changes: Any) -> None:
        """Change some fields."""
        write_json_atomic(self._path, {**self.read(), **changes, "updated": time.time()})


def is_taken(run: RunDir, sink: str) -> bool:
    """Whether a process tracks the run now."""
    if not run.tracked(sink).with_suffix(".lock").exists():
        return False
    try:
        with Place(run, sink, wait_s=0.0):
            return False
    except TakenError:
        return True


def _locked(descriptor: int) -> bool:
    """Take the lock of a file; where the file system has none, nobody is kept out."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
