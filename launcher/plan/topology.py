"""What this machine has, found out without torch."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.system import cores as host_cores

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The facts a plan depends on; a test makes them up."""

    num_cores: int
    """CPU cores this process may use: by its affinity, and by the time that its control groups grant."""
    num_gpus: int
    """NVIDIA GPUs this process may use."""
    host: str
    """This machine's name."""
    omp_num_threads: int | None = None
    """What the user's environment says of CPU threads per process; None: nothing."""
    has_slurm: bool = False
    """Whether sbatch is on PATH."""
    allocation: str | None = None
    """Id of the SLURM allocation that this runs in (salloc); None: in none."""
    in_step: bool = False
    """Whether this runs in a step of that allocation (srun bash), which holds what another step would need."""
    sbatch_variables: dict[str, str] = field(default_factory=dict)
    """sbatch's own (``SBATCH_*``), which fill what a profile leaves open."""
    python: str = "python"
    """The interpreter that runs this."""
    cwd: str = "/"
    """The working directory, from which a relative run directory is meant."""


def detect() -> Topology:
    """Look at this machine. Takes a few milliseconds where there is no GPU."""
    threads = (
        os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    )  # a list has one for each level of nesting
    return Topology(
        num_cores=host_cores.num_cores(),
        num_gpus=_num_gpus(),
        host=os.uname().nodename,
        omp_num_threads=int(threads) if threads.isdigit() else None,
        has_slurm=shutil.which("sbatch") is not None,
        allocation=os.environ.get("SLURM_JOB_ID"),
        in_step="SLURM_STEP_ID" in os.environ,
        sbatch_variables={name: value for name, value in os.environ.items() if name.startswith("SBATCH_")},
        python=sys.executable,
        cwd=str(Path.cwd()),
    )


def _num_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not _names(visible):  # as where workers are on the CPU: nothing need be asked
        return 0
    gpus, slices = listed_gpus()
    return num_visible(",".join(map(str, range(len(gpus)))) if visible is None else visible, gpus, slices)


def num_visible(visible: str, gpus: Sequence[str], slices: Sequence[tuple[int, str]] = ()) -> int:
    """How many devices CUDA sees: those of the list up to the first that is none; none at all where one comes twice.

    Where all are cut into slices (MIG), or the first is one, a process sees one slice (MIG user guide, "Device
    enumeration").

    Args:
        visible: ``CUDA_VISIBLE_DEVICES``: numbers, or UUIDs or beginnings of one (CUDA C++ Programming Guide,
            "CUDA Environment Variables").
        gpus: UUID of each GPU of the machine; empty where it is not known.
        slices: of its MIG slices, the GPU's number and the slice's own UUID.
    """
    found: list[str] = []
    for name in _names(visible):
        if name.startswith("MIG-"):
            candidates = [one for _, one in slices if one.startswith(name)] or ([name] if "" in gpus else [])
        elif name.startswith("GPU-"):
            candidates = [one for one in gpus if one.startswith(name)] or ([name] if "" in gpus else [])
        else:
            index = re.match(r"\+?\d+", name)
            candidates = [f"#{int(index[0])}"] if index and int(index[0]) < len(gpus) else []
        if len(candidates) != 1:
            break
        found += candidates
    if len(set(found)) < len(found):
        return 0
    cut = {f"#{gpu}" for gpu, _ in slices} | {gpus[gpu] for gpu, _ in slices}
    alone = found and (found[0].startswith("MIG-") or cut.issuperset(found))
    return 1 if alone else len(found)


def _names(visible: str) -> list[str]:
    """What a list names, up to the first that can be no device."""
    names = [name.strip() for name in visible.split(",")]
    return list(itertools.takewhile(lambda name: re.match(r"\+?\d|GPU-|MIG-", name), names))


def listed_gpus() -> tuple[list[str], list[tuple[int, str]]]:
    """UUIDs of the machine's GPUs, empty ones where nobody tells them; of their MIG slices, with the GPU's number."""
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs: `launch doctor` says so
            found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=60)
            if found.returncode == 0:
                gpus: list[str] = []
                slices: list[tuple[int, str]] = []
                for kind, text in re.findall(r"^ *(GPU|MIG) (.*)", found.stdout, re.MULTILINE):
                    told = re.search(r"\(UUID: (\S+)\)", text)
                    uuid = told[1] if told else ""
                    if kind == "GPU":
                        gpus.append(uuid)
                    else:  # a GPU's slices come below it
                        slices.append((len(gpus) - 1, uuid))
                return gpus, slices
    return [""] * len(list(Path("/dev").glob("nvidia[0-9]*"))), []
