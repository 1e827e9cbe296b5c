"""Finds out whether a run is being carried out now: asks SLURM for its job, the system for its process."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from launcher.backends.slurm import client as slurm_client
from launcher.errors import UsageError
from launcher.runs import history, whereabouts

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir
    from launcher.runs.whereabouts import JobState


def job_state(run: RunDir) -> JobState | None:
    """The state of the run's job; None if it has no job or SLURM does not answer."""
    job_id = whereabouts.job_of(run)
    try:
        return slurm_client.job_states([job_id])[job_id] if job_id else None
    except slurm_client.SlurmError:
        return None


def living(run: RunDir) -> str | None:
    """What carries the run out now, as in ``job 8``; None: nothing that can be seen from this machine."""
    jobs = [job_id for job_id in (whereabouts.job_of(run), whereabouts.post_job_of(run)) if job_id]
    try:
        alive = [job_id for job_id, job in slurm_client.job_states(jobs).items() if not job.over]
    except slurm_client.SlurmError as error:
        print(f"warning: whether job {jobs[0]} still runs is unknown: {error}", file=sys.stderr, flush=True)
        alive = []
    if alive:
        return f"job {alive[0]}"
    if not jobs and run.read_status()["state"] not in whereabouts.OVER and whereabouts.process_of(run):
        return f"process {whereabouts.process_of(run)}"
    return None


def refuse_second(run: RunDir) -> None:
    """Two that carry out the same run would both write its checkpoints.

    Raises:
        UsageError: something carries it out now.
    """
    found = living(run)
    if found:
        raise UsageError(f"{run}: runs as {found}; to start it anew: launch cancel {run} first")


def refuse_second_job(run: RunDir, job_id: str) -> None:
    """The same for a job that has come to its turn: was one submitted before it that is not over?

    Raises:
        UsageError: there is one.
    """
    submitted = [str(event["job_id"]) for event in history.events(run, "submitted")]
    before = submitted[: submitted.index(job_id)] if job_id in submitted else []
    try:
        alive = [other for other, job in slurm_client.job_states(before).items() if not job.over]
    except slurm_client.SlurmError:  # no squeue on the nodes, as in a container
        return
    if alive:
        raise UsageError(f"{run}: runs as job {alive[0]} already; launch cancel {run}, then launch resume {run}")
