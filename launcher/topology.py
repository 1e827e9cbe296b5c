"""What this machine has, found out without torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The facts a plan depends on; a test makes them up."""

    num_cores: int
    """CPU cores this process may use."""
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
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return Topology(
        num_cores=len(os.sched_getaffinity(0)),
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
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs: `launch doctor` says so
            found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=60)
            if found.returncode == 0:
                return sum(line.startswith("GPU ") for line in found.stdout.splitlines())
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
