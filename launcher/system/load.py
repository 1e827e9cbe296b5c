"""What this machine does at the moment: its cores, its memory, its GPUs."""

from __future__ import annotations

import os
import re
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
MOST_FAILURES = 5
"""It is asked no more after so many in a row: a GPU that is reset, or a machine that is busy, answers again."""
UUID = re.compile(r"GPU(-[0-9a-f]+){5}", re.IGNORECASE)
IDLE = (3, 4)
"""Columns of /proc/stat, from 0: idle, and waiting for a disk."""


class Load:
    """Measures it.

    Args:
        gpus: whether to ask for GPUs too.
        root: where /proc and /sys are; another one in tests.
        environment: variables of this process; ``CUDA_VISIBLE_DEVICES`` says which GPUs are meant. Where nvidia-smi may
            call those by other names than CUDA does, all are taken.
    """

    def __init__(self, *, gpus: bool, root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> None:
        self._ids = _ids(environment) if gpus else None
        self._num_failures = 0
        self._root = root
        self._before = self._times()

    def measure(self) -> dict[str, Any]:
        """The load since the last call, or since the beginning.

        Returns:
            ``cpu``: fraction of the time that the cores which this process may use were busy, by whomever, where it is
            known;
            ``memory_mb``: in use on the machine; ``free_mb``: what this process can still take, control groups
            counted; ``gpus``: of each what ``GPU_FIELDS`` names, as far as it is known.
        """
        busy, total = self._times()
        before, self._before = self._before, (busy, total)
        passed = total - before[1]
        lines = (self._root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        found: dict[str, Any] = {
            **({"cpu": round((busy - before[0]) / passed, 4)} if passed else {}),
            "memory_mb": (values["MemTotal"] - values["MemAvailable"]) // 10**6,
            "free_mb": memory.free(self._root, {}).num_bytes // 10**6,
        }
        gpus = self._gpus() if self._ids is not None else []
        return found | ({"gpus": gpus} if gpus else {})

    def _gpus(self) -> list[dict[str, float]]:
        """What nvidia-smi says of them; after too many failures it is asked no more."""
        command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
        command += [f"--id={self._ids}"] if self._ids else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ASK_S)
        except (FileNotFoundError, PermissionError):
            self._ids = None
        except (OSError, subprocess.SubprocessError):
            self._num_failures += 1
            if self._num_failures == MOST_FAILURES:
                self._ids = None
        else:
            self._num_failures = 0
            return parse_gpus(done.stdout)
        return []

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


def _ids(environment: Mapping[str, str]) -> str | None:
    """The GPUs that a process may use, as nvidia-smi takes them; empty: all that it knows; None: there are none.

    Numbers are its own only with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``: without it CUDA counts the fastest first. Of a slice
    (MIG) it knows the whole GPU only.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return ""
    names = [name.strip() for name in visible.split(",")]
    if names[0] in {"", "-1", "NoDevFiles"}:
        return None
    has_own_order = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    is_known = all(UUID.fullmatch(name) or (has_own_order and name.isdecimal()) for name in names)
    return ",".join(names) if is_known else ""
