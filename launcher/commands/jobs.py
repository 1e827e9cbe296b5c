"""``launch ps`` and ``launch cancel``: the runs below a folder, and an end to one of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import history, processes, slurm_client
from launcher.errors import TrainingError, UsageError
from launcher.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OVER = ("completed", "early_stopped", "failed", "cancelled")
END_S = 90
"""More than SLURM gives a job between SIGTERM and SIGKILL (KillWait, 30 s) and what a checkpoint takes."""
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400


def ps(folder: str, *, as_json: bool) -> None:
    """Print the runs below ``folder``, newest last: state, job, attempt, progress, best value and age of the news.

    Raises:
        UsageError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{folder}: no such folder; runs are made below runs/ unless --run-dir says otherwise")
    runs = sorted(find_runs(Path(folder)), key=lambda run: run.path.stat().st_mtime)
    rows = _rows(runs)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print(f"no runs in {folder}")
        return
    table = [("RUN", "STATE", "JOB", "ATTEMPT", "EPOCH", "STEP", "BEST", "UPDATED"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def find_runs(folder: Path, depth: int = 2) -> list[RunDir]:
    """``folder`` itself where it is a run, else the runs in it and, ``depth`` levels down, in its folders."""
    if RunDir(folder).exists:
        return [RunDir(folder)]
    if depth:
        with contextlib.suppress(PermissionError):
            return [run for entry in folder.iterdir() if entry.is_dir() for run in find_runs(entry, depth - 1)]
    return []


def job_of(run: RunDir) -> str | None:
    """The id of the run's last SLURM job, or None."""
    submitted = history.events(run, "submitted")
    return str(submitted[-1]["job_id"]) if submitted else None


def _rows(runs: Sequence[RunDir]) -> list[dict[str, Any]]:
    jobs = {str(run.path): job_of(run) for run in runs}
    status = {str(run.path): run.read_status() for run in runs}
    alive = [job for path, job in jobs.items() if job and status[path]["state"] not in OVER]
    try:
        states = slurm_client.job_states(alive)
    except slurm_client.SlurmError as error:
        print(f"the jobs' states are unknown: {error}", file=sys.stderr)
        states = {}
    rows = []
    for run in runs:
        path = str(run.path)
        job = jobs[path]
        found = status[path]
        fields = {key: found.get(key) for key in ("state", "attempt", "epoch", "step", "best", "updated")}
        state = states.get(job) if job else None
        rows.append({"run": str(run), "job_id": job, "job_state": state.state if state else None, **fields})
    return rows


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    best = row["best"]
    job = " ".join(filter(None, [row["job_id"], row["job_state"]]))
    numbers = (str(row[key]) if row[key] is not None else "-" for key in ("attempt", "epoch", "step"))
    value = f"{best['metric']} {best['value']:.4f}" if best else "-"
    return (row["run"], row["state"], job or "-", *numbers, value, _age(row["updated"]))


def _age(then: float | None) -> str:
    if then is None:
        return "-"
    age = time.time() - then
    for unit, seconds in (("d", DAY_S), ("h", HOUR_S), ("min", MINUTE_S)):
        if age >= seconds:
            return f"{age / seconds:.0f} {unit} ago"
    return f"{age:.0f} s ago"


def cancel(run: RunDir) -> None:
    """End a run: its job, or its process on this machine; wait until nothing of it is left.

    Raises:
        UsageError: it is over already, or runs on another machine.
        TrainingError: it did not end.
    """
    state = run.read_status()["state"]
    if state in OVER:
        raise UsageError(f"{run}: {state} already")
    job_id = job_of(run)
    if job_id is not None:
        slurm_client.run("scancel", job_id)
        _wait(lambda: slurm_client.job_states([job_id])[job_id].over, f"job {job_id}")
    else:
        _cancel_here(run)
    run.update_status(state="cancelled")
    run.append_event("cancelled", job_id=job_id)
    print(f"cancelled; go on with: launch resume {run}")


def _cancel_here(run: RunDir) -> None:
    plan = run.read_plan()
    if plan["host"] != os.uname().nodename:
        raise UsageError(f"{run}: runs on {plan['host']}; cancel it there")
    pid, started = plan["pid"], plan["process_started"]
    if processes.start_time(pid) == started:  # else it died without a word, and the number may be another's
        os.kill(pid, signal.SIGTERM)
    _wait(lambda: processes.start_time(pid) != started, f"process {pid}")


def _wait(is_over: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + END_S
    while not is_over():
        if time.monotonic() > deadline:
            raise TrainingError(f"{what} has not ended in {END_S} s")
        time.sleep(0.5)
