"""One worker in this process: no agent and no other processes, so breakpoints work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.errors import EXIT_OK, InterruptedRunError
from launcher.runs import history, quarantine
from launcher.runs.run_dir import RunDir, WorkerSpec

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan


def submit(plan: LaunchPlan) -> int:
    """Train here; an error leaves with its whole traceback."""
    run = RunDir(plan.run_dir)
    attempt = history.next_attempt(run)
    quarantine.prepare(run, attempt=attempt, node_rank=0, progress=lambda: None)
    run.append_event("attempt_started", attempt=attempt, node=0, workers=1)
    spec = WorkerSpec(run_dir=str(run.path), attempt=attempt, debug=plan.debug)
    from launcher.engine import worker

    outcome = worker.train_here(spec)
    if outcome == "preempted":
        raise InterruptedRunError(f"interrupted; go on with: launch resume {run}")
    print(f"run:  {run}")
    return EXIT_OK
