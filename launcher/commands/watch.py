"""``launch watch``: runs as they go, from their files alone: on this machine, or where they can be read."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.parser import parser_of
from launcher.commands.ps import find_runs
from launcher.commands.watched import LOOK_S, View, Watched, slowest_text, state_text
from launcher.errors import EXIT_OK, UsageError
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    if snapshot.slowest:
        parts.append(slowest_text(snapshot.slowest))
    return "  ".join(parts)


def _of(number: int | None) -> str:
    return "" if number is None else f"/{number}"
