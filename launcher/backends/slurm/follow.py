"""Follow SLURM jobs from the terminal, and say how they have ended."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from launcher.backends.slurm import client as slurm_client
from launcher.backends.slurm import job_end
from launcher.errors import (
    EXIT_PREFLIGHT,
    EXIT_RESUMABLE,
    InterruptedRunError,
    LaunchError,
    PreflightError,
    TrainingError,
)
from launcher.runs import diagnose, job_logs, whereabouts
from launcher.system.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from launcher.runs.run_dir import RunDir
    from launcher.runs.whereabouts import JobState

POLL_S = 2.0
MAX_FAILURES, PAUSE_S = 60, 10.0
SAFE_S = 5
"""How far the clocks of the controller and a node may be apart for a requeued job to start again early."""


def follow(job_id: str, *logs: Path) -> None:
    """Show a job's logs, and what becomes of the job, until it is over."""
    shown: JobState | None = None
    positions, has_run = dict.fromkeys(logs, 0), False

    def show_new() -> None:
        for log in logs:
            positions[log] = _print_from(log, positions[log])

    def is_over() -> bool:
        nonlocal shown, has_run
        state = _states([job_id])[job_id]
        show_new()
        if state != shown and state.state in ("PENDING", "RUNNING"):
            reason = f" ({state.reason})" if state.reason not in ("", "None") else ""
            where = f" on {state.nodes}" if state.nodes else reason
            print(f"job {job_id} {state.state.lower()}{where}", flush=True)
            if has_run and state.reason == "BeginTime":
                _start_early(job_id)
        has_run |= state.state == "RUNNING"
        shown = state
        return state.over

    wait_until(is_over, timeout_s=None, heed=lambda: None, every_s=POLL_S)  # a signal ends it by an exception
    show_new()


def _start_early(job_id: str) -> None:
    """Have a requeued job start as soon as it can.

    SLURM has it wait until the credentials of its last start have expired, two minutes by default. The nodes take new
    ones before, so long as these are the younger ones by the nodes' own clocks.
    """
    with contextlib.suppress(slurm_client.SlurmError):  # then it waits
        slurm_client.run("scontrol", "update", f"JobId={job_id}", f"StartTime=now+{SAFE_S}")


def follow_all(runs: Mapping[str, RunDir], posts: Mapping[str, RunDir]) -> None:
    """One line for each change of a job's state, until all jobs are over; then each run's state says so too.

    Args:
        runs: by the jobs that train them.
        posts: by the jobs that make their exports.
    """
    names = {job_id: f"{run.path.name}: job {job_id}" for job_id, run in runs.items()}
    names |= {job_id: f"{run.path.name}: exports: job {job_id}" for job_id, run in posts.items()}
    states: dict[str, JobState] = {}

    def are_over() -> bool:
        for job_id, state in _states([name for name in names if name not in states or not states[name].over]).items():
            if job_id not in states or states[job_id].state != state.state:
                print(f"{names[job_id]} {state.state.lower()}", flush=True)
            states[job_id] = state
        return all(state.over for state in states.values())

    wait_until(are_over, timeout_s=None, heed=lambda: None, every_s=POLL_S)
    for job_id, run in runs.items():
        whereabouts.settle(run, states[job_id])


def _states(job_ids: Sequence[str]) -> dict[str, JobState]:
    """The jobs' states; waits for a controller that does not answer for a while, as when it is restarted."""
    for _ in range(MAX_FAILURES):
        try:
            return slurm_client.job_states(job_ids)
        except slurm_client.SlurmError as error:
            print(f"SLURM does not answer, asking again: {error}", file=sys.stderr, flush=True)
            time.sleep(PAUSE_S)
    return slurm_client.job_states(job_ids)


def _print_from(file: Path, position: int) -> int:
    """Print what was appended to a file since ``position``; return the new one."""
    try:
        with file.open("rb") as stream:
            stream.seek(position)
            text = stream.read()
    except FileNotFoundError:
        return position
    sys.stdout.buffer.write(text)
    sys.stdout.flush()
    return position + len(text)


def conclude(run: RunDir, job_id: str) -> None:
    """Return where a run's job, which is over, has ended well.

    Raises:
        LaunchError: it has not; says how, and what to do.
    """
    job = _states([job_id])[job_id]
    state = whereabouts.settle(run, job)
    is_trained = state in whereabouts.TRAINED
    if is_trained and (job.state in ("COMPLETED", "UNKNOWN") or _ended_by_a_node(run)):
        return
    if is_trained and job.state == "CANCELLED":
        raise InterruptedRunError(f"job {job_id} was cancelled after training; its exports: launch export {run}")
    if state == "cancelled":
        raise InterruptedRunError(f"job {job_id} was cancelled; go on with: launch resume {run}")
    if state == "preempted" and (job.state != "FAILED" or slurm_client.exit_code(job_id) == EXIT_RESUMABLE):
        raise InterruptedRunError(f"job {job_id} ended as {job.state}; go on with: launch resume {run}")
    raise _error(job_id)(
        f"job {job_id} ended as {job.state}\n{diagnose.explain(run, job, job_end.explain)}\nmore: launch why {run}"
    )


def _ended_by_a_node(run: RunDir) -> bool:
    """Whether a node has ended the job, all done, since its batch script was lost: SLURM calls that cancelled."""
    said = max(run.slurm.glob("done-*"), key=lambda file: file.stat().st_mtime, default=None)
    return run.read_plan().is_elastic and said is not None and said.read_text(encoding="utf-8").strip() == "0"


def _error(job_id: str) -> type[LaunchError]:
    return PreflightError if slurm_client.exit_code(job_id) == EXIT_PREFLIGHT else TrainingError


def conclude_post(run: RunDir, job_id: str) -> None:
    """The same for the job that makes the exports.

    Raises:
        LaunchError: it has not ended well.
    """
    job = _states([job_id])[job_id]
    if job.state in ("COMPLETED", "UNKNOWN"):
        return
    cure = f"training is complete; make the exports by: launch export {run}"
    if job.state == "CANCELLED":
        raise InterruptedRunError(f"job {job_id}, which was to make the exports, was cancelled; {cure}")
    words = "\n".join(job_logs.last_words(run, job_id))
    raise TrainingError(f"job {job_id}, which was to make the exports, ended as {job.state}\n{words}\n{cure}")
