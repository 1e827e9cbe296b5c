"""What this machine does at the moment: its cores, its memory, its GPUs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.system import memory

if TYPE_CHECKING:
    from collections.abc import Mapping

GPU_FIELDS = {
    "index": "gpu",
    "utilization.gpu": "utilization",
    "memory.used": "memory_mb",
    "memory.total": "total_mb",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
}
"""What nvidia-smi is asked for, and what we call it. It gives MiB, percent, degrees Celsius and watts."""
PERCENT = "utilization"
ASK_S = 10.0
"""Seconds within which it must answer."""
IDLE = (3, 4)
"""Columns of /proc/stat, from 0: idle, and waiting for a disk."""


class Load:
    """Measures it.

    Args:
        gpus: whether to ask for GPUs too.
        root: where /proc and /sys are; another one in tests.
        environment: variables of this process; ``CUDA_VISIBLE_DEVICES`` says which GPUs are meant.
    """

    def __init__(self, *, gpus: bool, root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> None:
        self._has_gpus = gpus
        self._root = root
        self._visible = environment.get("CUDA_VISIBLE_DEVICES")
        self._before = self._times()

    def measure(self) -> dict[str, Any]:
        """The load since the last call, or since the beginning.

        Returns:
            ``cpu``: fraction of the time that the cores which this process may use were busy, by whomever;
            ``memory_mb``: in use on the machine; ``free_mb``: what this process can still take, control groups
            counted; ``gpus``: of each what ``GPU_FIELDS`` names, as far as it is known.
        """
        busy, total = self._times()
        before, self._before = self._before, (busy, total)
        passed = total - before[1]
        lines = (self._root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        found: dict[str, Any] = {
            "cpu": round((busy - before[0]) / passed, 4) if passed else 0.0,
            "memory_mb": (values["MemTotal"] - values["MemAvailable"]) // 10**6,
            "free_mb": memory.free(self._root, {}).num_bytes // 10**6,
        }
        if self._has_gpus:
            asked = _ask(self._visible)
            self._has_gpus = asked is not None  # a tool that is missing or broken is not asked again
            found |= {"gpus": parse_gpus(asked)} if asked else {}
        return found

    def _times(self) -> tuple[int, int]:
        """Ticks for which the cores that we may use were busy, and all of them."""
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        busy = total = 0
        for line in (self._root / "proc/stat").read_text(encoding="utf-8").splitlines():
            name, *columns = line.split()
            if name in cores:
                ticks = [int(column) for column in columns[:8]]  # the rest, time of guests, is counted in these
                total += sum(ticks)
                busy += sum(ticks) - sum(ticks[column] for column in IDLE)
        return busy, total


def parse_gpus(text: str) -> list[dict[str, float]]:
    """What nvidia-smi printed of each GPU: CSV without header and units, in the order of ``GPU_FIELDS``."""
    gpus = []
    for line in text.splitlines():
        gpu: dict[str, float] = {}
        for name, value in zip(GPU_FIELDS.values(), line.split(","), strict=False):
            try:
                number = float(value)
            except ValueError:  # [N/A], as of the utilization of a GPU that is cut into slices
                continue
            gpu[name] = round(number / 100, 4) if name == PERCENT else int(number) if number.is_integer() else number
        if "gpu" in gpu:
            gpus.append(gpu)
    return gpus


def _ask(visible: str | None) -> str | None:
    """What nvidia-smi prints; None where it is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    if visible and "MIG-" not in visible:  # of a slice it knows the whole GPU only
        command += [f"--id={visible}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
