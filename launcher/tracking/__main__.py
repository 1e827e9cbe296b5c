"""``python -m launcher.tracking RUN SINK``: the process that sends a run's records to one sink.

It follows the run until its standard input says that the run is over, by a byte or by its end. Each line that it prints
is for the person who launched the run; all else goes to its log. It knows nothing of training, nor training of it.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from typing import TYPE_CHECKING

from launcher.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, UsageError
from launcher.runs.run_dir import RunDir
from launcher.system import console
from launcher.system.processes import die_with_parent, offer_to_kernel
from launcher.system.redact import one_line, redact
from launcher.tracking import sink as sinks
from launcher.tracking.follow import follow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.plan.launch_plan import LaunchPlan
    from launcher.recipe.schema import Recipe

NICENESS = 10
"""Of the process: training comes first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Track a run; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher.tracking", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("sink", choices=sinks.NAMES)
    parser.add_argument("--mode", help="of wandb: auto, online or offline")
    parser.add_argument("--beside", action="store_true", help="training runs on this machine")
    args = parser.parse_args(argv)
    die_with_parent()
    offer_to_kernel(1000)
    os.nice(NICENESS)
    run = RunDir.existing(args.run_dir)
    terminal = os.dup(1)
    run.logs.mkdir(exist_ok=True)
    console.redirect(run.tracking_log(args.sink))

    def say(line: str) -> None:
        os.write(terminal, f"{line}\n".encode())

    try:
        return _track(run, args.sink, args.mode, beside=args.beside, say=say)
    except UsageError as error:
        say(str(error))
        return EXIT_USAGE
    except BaseException as error:  # SystemExit as well, which wandb raises where its service failed
        print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
        if args.sink == "wandb":
            from launcher.tracking import wandb_service

            wandb_service.end()
        goes_on = "training goes on, and metrics.jsonl has every number; " if args.beside else ""
        say(f"{args.sink}: off: {one_line(error)}; {goes_on}`launch track {run} --{args.sink}` goes on from here")
        return EXIT_FAILED


def _track(run: RunDir, name: str, mode: str | None, *, beside: bool, say: Callable[[str], None]) -> int:
    from launcher.recipe import load as recipes

    recipe, plan = recipes.read_resolved(run.recipe), run.read_plan()
    over = Told()
    if name == "wandb":
        return _track_with_wandb(run, recipe, plan, mode, beside=beside, say=say, over=over)
    follow(run, recipe, sinks.build(name, run, recipe, plan), over=over)
    return EXIT_OK


def _track_with_wandb(
    run: RunDir,
    recipe: Recipe,
    plan: LaunchPlan,
    mode: str | None,
    *,
    beside: bool,
    say: Callable[[str], None],
    over: Callable[[float], bool],
) -> int:
    """Send where the server can be used, else keep the record in the run directory, and say why."""
    from launcher.tracking import wandb_folder
    from launcher.tracking.wandb import UnsentError, Wandb
    from launcher.tracking.wandb_mode import resolve_mode

    found, reason = resolve_mode(mode or recipe.tracking.wandb.mode)
    if found == "disabled":
        say(f"wandb: off: {reason}")
        return EXIT_FAILED
    if found == "online":
        sink = Wandb(run, recipe, plan, online=True, say=say, beside=beside)
        try:
            follow(run, recipe, sink, over=over)
        except sinks.UnreachableError as error:
            reason = str(error)
        except UnsentError as error:
            run.append_event(wandb_folder.UNSYNCED, folder=sink.folder.name, reason=str(error))
            say(
                f"wandb: not all was sent: {error}; `{wandb_folder.sync_command([sink.folder])}` sends what is recorded"
            )
            return EXIT_FAILED
        else:
            return EXIT_OK
    follow(run, recipe, Wandb(run, recipe, plan, online=False, say=say, beside=beside, reason=reason), over=over)
    return EXIT_OK


class Told:
    """Whether standard input has said that the run is over."""

    def __init__(self) -> None:
        self._is_over = False

    def __call__(self, seconds: float) -> bool:
        """Wait so long at most for it to say so."""
        if not self._is_over and select.select([0], [], [], seconds)[0]:
            os.read(0, 1)
            self._is_over = True
        return self._is_over


if __name__ == "__main__":
    sys.exit(main())
