"""How many CPU cores this process can use: the least of its affinity and its control groups' quotas."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.system import control_groups

if TYPE_CHECKING:
    from collections.abc import Iterator

PERIOD_US = 100_000
"""Microseconds: the period of a quota where a control group does not name one."""


def num_cores(root: Path = Path("/")) -> int:
    """Whole cores, at least one: with 2.5 cores' worth of time a third thread would make the others wait for it.

    Args:
        root: where /proc and /sys are; another one in tests.
    """
    usable, granted = len(os.sched_getaffinity(0)), quota(root)
    return usable if granted is None else max(1, min(usable, int(granted)))


def quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process's control groups, of version 1 or 2, grant; None: no limit."""
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    """The quotas of this process's groups and of all groups above them."""
    for groups in control_groups.own("cpu", root):
        for group in groups:
            found = (_read_v2 if group.version == 2 else _read_v1)(group.path)  # noqa: PLR2004
            if found is not None:
                yield found


def _read_v2(group: Path) -> float | None:
    try:
        granted, _, period = (group / "cpu.max").read_text(encoding="utf-8").strip().partition(" ")
        return int(granted) / int(period or PERIOD_US)
    except (OSError, ValueError):  # "max" raises ValueError
        return None


def _read_v1(group: Path) -> float | None:
    try:
        granted = int((group / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    period_file = group / "cpu.cfs_period_us"
    period = int(period_file.read_text(encoding="utf-8")) if period_file.is_file() else PERIOD_US
    return granted / period if granted > 0 else None  # -1: no limit
