"""Control groups of our own with a memory limit that the kernel enforces, of version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Self


class MemoryGroup:
    """A control group below this process's own.

    Args:
        name: of its folder.
        limit_bytes: of its memory.

    Raises:
        OSError: this machine does not let us make one.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        groups = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
        self._v1 = "memory" in groups
        mount = Path("/sys/fs/cgroup", "memory" if self._v1 else "")
        self.path = mount / groups["memory" if self._v1 else ""].lstrip("/") / name
        with contextlib.suppress(FileExistsError):
            self.path.mkdir()
        (self.path / ("memory.limit_in_bytes" if self._v1 else "memory.max")).write_text(str(limit_bytes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.path.rmdir()

    def enter(self) -> None:
        """Have this process be in it; for a child before it becomes another program."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def run(self, arguments: list[str], **options) -> subprocess.CompletedProcess[str]:
        """Run a program in it."""
        return subprocess.run(arguments, preexec_fn=self.enter, text=True, check=False, **options)

    def peak_bytes(self) -> int:
        """The most that was taken, reclaimable page cache and all."""
        return int((self.path / ("memory.max_usage_in_bytes" if self._v1 else "memory.peak")).read_text())
