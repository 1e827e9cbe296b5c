"""Where a run is now: the SLURM job, or the process on this machine, that carries it out; and what became of it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from launcher.backends.slurm import client as slurm_client
from launcher.runs import history
from launcher.system import processes
from launcher.errors import UsageError

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir
    from launcher.backends.slurm.client import JobState

OVER = ("completed", "early_stopped", "failed", "cancelled")
"""The states of a run that nothing carries out any more."""
TRAINED = ("completed", "early_stopped")
"""Those of a run that has nothing left to train."""
UNSETTLED = ("pending", "running")
"""States that somebody lived to write who was to write the next one too."""
NUM_SHOWN = 4
"""Of nodes: for each of so many its own command is shown."""


def job_of(run: RunDir) -> str | None:
    """Id of the SLURM job that the run was last launched as; None where it was last launched in another way."""
    return _last_id(run, "submitted")


def post_job_of(run: RunDir) -> str | None:
    """Id of the SLURM job that makes the exports of the run as it was last launched, or None."""
    return _last_id(run, "post_submitted")


def _last_id(run: RunDir, kind: str) -> str | None:
    found = history.since_launched(run, kind)
    return str(found[-1]["job_id"]) if found else None


def job_state(run: RunDir) -> JobState | None:
    """What SLURM says of the run's job; None where it has none, or SLURM does not answer."""
    job_id = job_of(run)
    try:
        return slurm_client.job_states([job_id])[job_id] if job_id else None
    except slurm_client.SlurmError:
        return None


def settled(state: str, job: JobState | None) -> str:
    """The state of a run, where its job may have ended before anybody wrote down that it did."""
    if job is None or not job.over or job.state == "UNKNOWN":
        return state
    if job.state == "CANCELLED" and state in (*UNSETTLED, "preempted"):
        return "cancelled"
    if job.state == "PREEMPTED" and state in UNSETTLED:
        return "preempted"
    return "failed" if state in UNSETTLED else state


def settle(run: RunDir, job: JobState) -> str:
    """Write down the state of a run whose job is over; return it."""
    before = run.read_status()["state"]
    state = settled(before, job)
    if state != before:
        run.update_status(state=state)
    return state


def note_preempted(run: RunDir) -> None:
    """Write down that a run was stopped and can go on; one that somebody has cancelled stays so."""
    if run.read_status()["state"] != "cancelled":
        run.update_status(state="preempted")


def resume_command(run: RunDir) -> str:
    """How to go on with a run, on every machine where its nodes were started by hand."""
    plan, command = run.read_plan(), f"launch resume {run}"
    if plan.get("backend") != "torchrun" or plan["nodes"] == 1:
        return command
    nodes = [f"{command} --node-rank {node} --rdzv-endpoint {plan['rdzv_endpoint']}" for node in range(plan["nodes"])]
    shown = nodes if len(nodes) <= NUM_SHOWN else [*nodes[:2], f"… up to --node-rank {len(nodes) - 1}"]
    return "".join(f"\n  {line}" for line in shown)


def living(run: RunDir) -> str | None:
    """What carries the run out now, as in ``job 8``; None: nothing that can be seen from this machine."""
    jobs = [job_id for job_id in (job_of(run), post_job_of(run)) if job_id]
    try:
        alive = [job_id for job_id, job in slurm_client.job_states(jobs).items() if not job.over]
    except slurm_client.SlurmError as error:
        print(f"warning: whether job {jobs[0]} still runs is unknown: {error}", file=sys.stderr, flush=True)
        alive = []
    if alive:
        return f"job {alive[0]}"
    if not jobs and run.read_status()["state"] not in OVER and process_of(run):
        return f"process {process_of(run)}"
    return None


def process_of(run: RunDir) -> int | None:
    """The living process on this machine that the run was launched by, or None."""
    plan = run.read_plan()
    is_it = plan["host"] == os.uname().nodename and processes.start_time(plan["pid"]) == plan["process_started"]
    return int(plan["pid"]) if is_it else None


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
