"""The control groups that this process is in, of version 1 or 2: what they allow, and those above them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True)
class ControlGroup:
    """One of them."""

    path: Path
    """Its folder."""
    version: int
    """Of its files: 1 or 2."""


def own(controller: str, root: Path) -> Iterator[list[ControlGroup]]:
    """For each hierarchy that has a controller: this process's group and all above it, the innermost first.

    Args:
        controller: ``cpu`` or ``memory``.
        root: where /proc and /sys are; another one in tests.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            mount, version = root / "sys/fs/cgroup" / controller, 1
        else:
            continue
        inner = mount / path.lstrip("/")
        # Within a container the path may be that of the host, and the mount point itself is ours.
        folders = [inner, *inner.parents] if inner.is_dir() else [mount]
        yield [ControlGroup(folder, version) for folder in folders if folder.is_relative_to(mount)]
