"""``launch watch``: runs as they go, from their files alone: on this machine, or where they can be read."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends import living
from launcher.commands.parser import parser_of
from launcher.commands.ps import find_runs
from launcher.commands.run_end import Ending
from launcher.errors import EXIT_OK, UsageError
from launcher.runs import whereabouts
from launcher.runs.progress import Progress, Snapshot
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.runs.whereabouts import JobState

LOOK_S = 1.0
"""Seconds between two looks at the files."""
ASK_S = 15.0
"""Seconds between two questions to SLURM."""


def main(argv: Sequence[str]) -> int:
    """Run ``launch watch``; return its exit code."""
    parser = parser_of("watch", "Show how runs get on, from their files, until they have ended.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, or a folder of runs")
    parser.add_argument("--once", action="store_true", help="show them as they are, and end")
    parser.add_argument("--json", action="store_true", dest="as_json", help="as they are, for programs, and end")
    args = parser.parse_args(argv)
    watched = [Watched(run) for run in _existing(args.runs)]
    if args.as_json:
        print(json.dumps([one.to_dict() for one in watched], indent=2))
        return EXIT_OK
    try:
        if sys.stdout.isatty():
            from launcher.commands import watch_screen

            watch_screen.show(watched, once=args.once)
        else:
            _print_lines(watched, once=args.once)
    except KeyboardInterrupt:  # the usual end: nothing to say
        return 128 + signal.SIGINT
    return EXIT_OK


def _existing(names: Sequence[str]) -> list[RunDir]:
    found = []
    for name in names:
        runs = find_runs(Path(name)) if Path(name).is_dir() else []
        found += sorted(runs, key=lambda run: run.path.stat().st_mtime) or [RunDir.existing(name)]
    if not found:
        raise UsageError("no runs to watch")
    return found


@dataclass(frozen=True, kw_only=True)
class View:
    """What is shown of a run."""

    snapshot: Snapshot
    """From its files."""
    job: JobState | None
    """As SLURM sees its job; None: it has none, or SLURM does not answer."""


class Watched:
    """A run that is watched.

    Args:
        run: its directory.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._progress = Progress(run)
        self._ending = Ending(run)
        self._asked: float | None = None
        self._job: JobState | None = None

    def look(self) -> View:
        """It now."""
        if self._asked is None or time.monotonic() - self._asked >= ASK_S:
            self._job, self._asked = living.job_state(self._run), time.monotonic()
        snapshot = self._progress.look()
        state = whereabouts.settled(snapshot.state, self._job)  # type: ignore[arg-type]  # as written in status.json
        return View(snapshot=replace(snapshot, state=state), job=self._job)

    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._ending.has_come()

    def to_dict(self) -> dict[str, object]:
        """For programs."""
        view = self.look()
        job = view.job and {"job_id": view.job.job_id, "state": view.job.state, "reason": view.job.reason}
        return view.snapshot.to_dict() | {"job": job}


def _print_lines(watched: Sequence[Watched], *, once: bool) -> None:
    """A line for each run, and another one each time that something of it has changed."""
    shown: dict[int, str] = {}
    while True:
        ended = [one.has_ended() for one in watched]
        for number, one in enumerate(watched):
            text = line(one.look())
            if shown.get(number) != text:
                print(text, flush=True)
                shown[number] = text
        if once or all(ended):
            return
        time.sleep(LOOK_S)


def line(view: View) -> str:
    """A run in a line, without what changes by itself as time goes by."""
    snapshot = view.snapshot
    parts = [snapshot.run, state_text(view)]
    if snapshot.epoch is not None and snapshot.step is not None:
        parts.append(f"epoch {snapshot.epoch}{_of(snapshot.epochs)}  step {snapshot.step}{_of(snapshot.num_steps)}")
    parts += [f"{name} {snapshot.train[name]:.4g}" for name in ("loss", "images_per_s") if name in snapshot.train]
    if snapshot.best:
        parts.append(f"best {snapshot.best['metric']} {snapshot.best['value']:.4f}")
    return "  ".join(parts)


def state_text(view: View) -> str:
    """The state, and why a job waits."""
    job = view.job
    if job and job.state == "PENDING":
        return f"queued ({job.reason})" if job.reason not in ("", "None") else "queued"
    return view.snapshot.state


def _of(number: int | None) -> str:
    return "" if number is None else f"/{number}"
