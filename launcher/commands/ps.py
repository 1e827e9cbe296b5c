"""``launch ps``: the runs below a folder, with what SLURM says of their jobs."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.backends.slurm import client as slurm_client
from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError
from launcher.runs import whereabouts
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.runs.whereabouts import JobState

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400


def main(argv: Sequence[str]) -> int:
    """Run ``launch ps``; return its exit code."""
    parser = parser_of("ps", "List the runs below a folder: state, job, progress.")
    parser.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="default: runs")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    args = parser.parse_args(argv)
    ps(args.folder, as_json=args.as_json)
    return EXIT_OK


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


def _rows(runs: Sequence[RunDir]) -> list[dict[str, Any]]:
    status = {run: run.read_status() for run in runs}
    jobs = {run: _job_that_counts(run, status[run]["state"]) for run in runs}
    try:
        states = slurm_client.job_states([job_id for job_id in jobs.values() if job_id])
    except slurm_client.SlurmError as error:
        print(f"the jobs' states are unknown: {error}", file=sys.stderr)
        states = {}
    return [_row(run, status[run], jobs[run], states.get(jobs[run] or "")) for run in runs]


def _job_that_counts(run: RunDir, state: str) -> str | None:
    """The job of a run that may still run: the training job, or after training the one that makes exports."""
    if state in whereabouts.TRAINED:
        return whereabouts.post_job_of(run)
    return None if state in whereabouts.OVER else whereabouts.job_of(run)


def _row(run: RunDir, status: dict[str, Any], asked: str | None, job: JobState | None) -> dict[str, Any]:
    is_trained = status["state"] in whereabouts.TRAINED
    exports = asked if is_trained and job and not job.over else None
    return {
        "run": str(run),
        "job_id": exports or whereabouts.job_of(run),
        "job_state": job.state if job and (exports or not is_trained) else None,
        "job_makes": "exports" if exports else None,
        "state": (state := whereabouts.settled(status["state"], None if is_trained else job)),
        "state_in_words": whereabouts.shown(run, state),
        "nodes": status.get("nodes"),
        "nodes_left": whereabouts.nodes_left(run),
        **{key: status.get(key) for key in ("attempt", "epoch", "epochs", "step", "best", "updated")},
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    best = row["best"]
    job = " ".join(filter(None, [row["job_id"], row["job_state"], row["job_makes"]]))
    epoch, epochs = whereabouts.epoch_shown(row), row["epochs"]
    places = (row["attempt"], f"{epoch}/{epochs}" if epoch and epochs else epoch, row["step"])
    numbers = ("-" if place is None else str(place) for place in places)
    value = f"{best['metric']} {best['value']:.4f}" if best else "-"
    state = row["state_in_words"] + (f" on {row['nodes_left']}" if row["nodes_left"] else "")
    return (row["run"], state, job or "-", *numbers, value, _age(row["updated"]))


def _age(then: float | None) -> str:
    if then is None:
        return "-"
    age = time.time() - then
    for unit, seconds in (("d", DAY_S), ("h", HOUR_S), ("min", MINUTE_S)):
        if age >= seconds:
            return f"{age / seconds:.0f} {unit} ago"
    return f"{age:.0f} s ago"
