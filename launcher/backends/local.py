"""One worker in this process: no agent and no other processes, so breakpoints work."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from launcher.errors import EXIT_OK, InterruptedRunError
from launcher.runs import diagnose, history, quarantine, states
from launcher.runs.run_dir import RunDir
from launcher.runs.worker_spec import WorkerSpec

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan


def submit(plan: LaunchPlan) -> int:
    """Train here; an error leaves with its whole traceback."""
    run = RunDir(plan.run_dir)
    attempt = history.next_attempt(run)
    from launcher.engine.user import scan

    quarantine.prepare(run, attempt=attempt, node_rank=0, progress=lambda: None, scan_own=scan.scan)
    run.append_event("attempt_started", attempt=attempt, node=0, workers=1)
    spec = WorkerSpec(run_dir=str(run.path), attempt=attempt, debug=plan.debug)
    from launcher.engine import worker

    try:
        outcome = worker.train_here(spec)
    except Exception:
        _record_failure(run, attempt)
        raise
    if outcome == "preempted":
        raise InterruptedRunError(f"interrupted; go on with: launch resume {run}")
    print(f"run:  {run}")
    return EXIT_OK


def _record_failure(run: RunDir, attempt: int) -> None:
    """Leave for `launch why` and `launch ps` that the run failed."""
    with contextlib.suppress(OSError):  # a full disk
        cause, message = diagnose.cause_of_end(run, attempt)
        states.move(run, "failed", attempt=attempt)
        run.append_event("attempt_ended", attempt=attempt, node=0, cause=cause, message=message)
