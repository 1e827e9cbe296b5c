"""Finds the SLURM job or process that carries out a run, and what the job's end means for the run's state."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.runs import history, states
from launcher.system import processes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.runs.run_dir import RunDir, State

OVER = ("completed", "early_stopped", "failed", "cancelled")
"""States of a run that is over."""
TRAINED = ("completed", "early_stopped")
"""States of a run that has nothing left to train."""
UNSETTLED = ("pending", "running")
"""States whose writer was to write the next one too: if it has died, they are out of date."""
NUM_SHOWN = 4
"""With at most this many nodes, show the command of each."""
JOB_OVER = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"),
)
"""SLURM's states of a job that will not run again by itself; one that is preempted and queued again is PENDING."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job as SLURM sees it now."""

    job_id: str = ""
    """Its id."""
    state: str
    """PENDING, RUNNING, COMPLETED and so on; UNKNOWN where SLURM has forgotten it."""
    reason: str = ""
    """Why it waits or has ended, in SLURM's word."""
    nodes: str = ""
    """Node list, as in n[1-2]."""
    expected: str = field(default="", compare=False)
    """When SLURM means to start it, where it waits and that is known; local time, as in 2026-01-31T12:00:00. SLURM
    thinks anew all the time: it is no other state."""

    @property
    def over(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in JOB_OVER or self.state == "UNKNOWN"


def job_of(run: RunDir) -> str | None:
    """Id of the SLURM job that the run was last launched as; None where it was last launched in another way."""
    return _last_id(run, "submitted")


def post_job_of(run: RunDir) -> str | None:
    """Id of the SLURM job that makes the exports of the run as it was last launched, or None."""
    return _last_id(run, "post_submitted")


def _last_id(run: RunDir, kind: str) -> str | None:
    found = history.since_launched(run, kind)
    return str(found[-1]["job_id"]) if found else None


def settled(state: State, job: JobState | None) -> State:
    """The state of a run, corrected if its job has ended and nobody has recorded it."""
    if job is None or not job.over or job.state == "UNKNOWN":
        return state
    if job.state == "CANCELLED" and state in (*UNSETTLED, "preempted"):
        return "cancelled"
    if job.state == "PREEMPTED" and state in UNSETTLED:
        return "preempted"
    return "failed" if state in UNSETTLED else state


def shown(run: RunDir, state: State) -> str:
    """A state in the word that people use: ``preempted`` is ``interrupted`` where somebody stopped the run (Ctrl-C)."""
    ended = history.since_launched(run, "attempt_ended") if state == "preempted" else []
    return "interrupted" if ended and ended[-1].get("cause") == "interrupted" else state


def settle(run: RunDir, job: JobState) -> State:
    """Record the state of a run whose job is over; return it."""
    before: State = run.read_status()["state"]
    state = settled(before, job)
    if state != before:
        states.move(run, state)
    return state


def note_preempted(run: RunDir) -> None:
    """Record that a run was stopped and can be resumed; one that is over stays over."""
    if run.read_status()["state"] not in OVER:
        states.move(run, "preempted")


def epoch_shown(status: Mapping[str, Any]) -> int | None:
    """The epoch that a run is in, or its last, from 1 as people count; None: it has not begun.

    Args:
        status: ``status.json``, which has that of the next step, from 0.
    """
    epoch, epochs = status.get("epoch"), status.get("epochs")
    if epoch is None:
        return None
    number = int(max(epoch, 1) if status.get("state") in TRAINED else epoch + 1)
    return number if epochs is None else min(number, epochs)


def nodes_left(run: RunDir) -> str:
    """``2 of 3 nodes`` where a run that shrinks and grows trains on fewer than all now; else an empty text."""
    status = run.read_status()
    if status["state"] != "running" or "nodes" not in status:
        return ""
    nodes, most = status["nodes"], run.read_plan().nodes
    return f"{nodes} of {most} nodes" if nodes < most else ""


def resume_command(run: RunDir) -> str:
    """The command that resumes a run; one for each node where nodes were started by hand."""
    plan, command = run.read_plan(), f"launch resume {run}"
    if plan.backend != "torchrun" or plan.nodes == 1:
        return command
    nodes = [f"{command} --node-rank {node} --rdzv-endpoint {plan.rdzv_endpoint}" for node in range(plan.machines)]
    shown = nodes if len(nodes) <= NUM_SHOWN else [*nodes[:2], f"… up to --node-rank {len(nodes) - 1}"]
    return "".join(f"\n  {line}" for line in shown)


def process_of(run: RunDir) -> int | None:
    """Id of the living process on this machine that launched the run, or None."""
    by = run.read_launched()
    is_here = bool(by.pid) and by.host == os.uname().nodename
    return by.pid if is_here and processes.start_time(by.pid) == by.process_started else None
