"""This machine, or one of several started by hand: the node supervisor, in this process or in the background."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.errors import EXIT_OK
from launcher.node import supervisor
from launcher.runs.run_dir import RunDir
from launcher.system import processes

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan


submit = supervisor.supervise
"""Run the plan in this process: the function that ``python -m launcher.node``, the plan's command, calls too."""


def detach(plan: LaunchPlan) -> int:
    """Start the plan's command in a session of its own, which outlives this terminal; it writes to a log of its own."""
    run = RunDir(plan.run_dir)
    log = run.launch_log(plan.node_rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, tempfile.TemporaryFile("w+") as recipe:
        json.dump(plan.recipe, recipe)
        recipe.seek(0)
        started = subprocess.Popen(
            [sys.executable, *plan.command[1:], "--recipe-from-stdin"],
            stdin=recipe,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    if plan.node_rank == 0:  # by which the run is found again: to cancel it, to refuse a second one
        launched = run.read_launched()
        run.write_plan(plan, replace(launched, pid=started.pid, process_started=processes.start_time(started.pid)))
    print(
        f"process {started.pid} goes on in the background (log: {log}); follow it by: launch logs {run} -f; "
        f"stop it by: launch cancel {run}",
        flush=True,
    )
    return EXIT_OK
