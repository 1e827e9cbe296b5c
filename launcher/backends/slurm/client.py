"""Runs SLURM's own commands and reads what they say about jobs, with or without accounting."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from launcher.errors import LaunchError
from launcher.runs.whereabouts import JobState

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S = 60
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER")
READ = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_")
"""Beginnings of the variables that SLURM's commands read as options: they would answer something else."""
MAX_ARRAY_SIZE = 1001
"""SLURM's own, where it does not say."""


class SlurmError(LaunchError):
    """A command of SLURM failed."""


def clean_environment() -> dict[str, str]:
    """This process's environment without what another job or another launcher left in it.

    Inside an allocation SLURM_* would be read by sbatch as options; SQUEUE_PARTITION would hide jobs;
    CUDA_VISIBLE_DEVICES would reach the job.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or not (name.startswith(READ) or name == "CUDA_VISIBLE_DEVICES")
    }


def run(*command: str, stdin: str | None = None) -> str:
    """Standard output of one of SLURM's commands; ``stdin`` is what it reads.

    Raises:
        SlurmError: it failed, is not there or gave no answer; with its own words.
    """
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            env=clean_environment(),
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]}: not found; SLURM's commands are on PATH where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer in {TIMEOUT_S} s; is slurmctld up? (scontrol ping)") from None
    if done.returncode:
        raise SlurmError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def job_states(job_ids: Sequence[str]) -> dict[str, JobState]:
    """The state of each job: from squeue for those that live, then from the controller's memory, then from accounting.

    Raises:
        SlurmError: the controller does not answer.
    """
    if not job_ids:
        return {}
    found: dict[str, JobState] = {}
    # All of a user's jobs in one question: one that is over is no error then.
    for line in run("squeue", "--noheader", "--me", "--states=all", "--array", "--format=%i|%T|%r|%S|%N").splitlines():
        job_id, state, reason, begin, nodes = line.strip().split("|", 4)
        if job_id in job_ids:
            expected = begin if state == "PENDING" and begin[:1].isdigit() else ""
            found[job_id] = JobState(job_id=job_id, state=state, reason=reason, nodes=nodes, expected=expected)
    return {job_id: found.get(job_id) or _remembered(job_id) for job_id in job_ids}


def _remembered(job_id: str) -> JobState:
    try:
        text = run("scontrol", "show", "job", "--oneliner", job_id)
        fields = dict(part.split("=", 1) for part in re.findall(r"(?:^|\s)((?:JobState|Reason|NodeList)=\S*)", text))
        reason, nodes = fields.get("Reason", ""), fields.get("NodeList", "")
        return JobState(job_id=job_id, state=fields["JobState"], reason=reason, nodes=nodes)
    except (SlurmError, KeyError):
        pass
    try:
        text = run("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=State,NodeList")
        state, _, nodes = text.splitlines()[0].partition("|")
        return JobState(job_id=job_id, state=state.split()[0], nodes=nodes)
    except (SlurmError, IndexError):  # no accounting on this cluster
        return JobState(job_id=job_id, state="UNKNOWN")


def exit_code(job_id: str) -> int | None:
    """The exit code of the script of a job that is over; None if SLURM has forgotten it."""
    for command in (
        ("scontrol", "show", "job", "--oneliner", job_id),
        ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=ExitCode"),
    ):
        with contextlib.suppress(SlurmError):
            found = re.search(r"(?:^|\sExitCode=)(\d+):\d+", run(*command))
            if found:
                return int(found[1])
    return None


def max_array_size() -> int:
    """How many elements a job array may have."""
    with contextlib.suppress(SlurmError):  # as on a machine without SLURM, for a dry run
        said = run("scontrol", "show", "config")
        # The first is one more than the highest index, the second a limit of its own.
        found = re.findall(r"(?:^MaxArraySize\s*= |\bmax_array_tasks=)(\d+)", said, re.MULTILINE)
        return max(1, min(map(int, found), default=MAX_ARRAY_SIZE))
    return MAX_ARRAY_SIZE


@dataclass(frozen=True, kw_only=True)
class Maintenance:
    """A window in which the cluster, or a part of it, starts no jobs."""

    name: str
    """Name of the reservation."""
    starts: str
    """When, as scontrol writes it."""
    minutes: int
    """From now until then, whole ones."""


def next_maintenance() -> Maintenance | None:
    """The maintenance that comes next, of those that are known.

    Raises:
        SlurmError: the controller does not answer.
    """
    found = []
    for line in run("scontrol", "show", "reservation", "--oneliner").splitlines():
        fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
        if "MAINT" in fields.get("Flags", "").split(","):
            starts = fields["StartTime"]
            seconds = datetime.fromisoformat(starts).timestamp() - time.time()
            found.append(Maintenance(name=fields["ReservationName"], starts=starts, minutes=int(seconds // 60)))
    return min((item for item in found if item.minutes >= 0), key=lambda item: item.minutes, default=None)
