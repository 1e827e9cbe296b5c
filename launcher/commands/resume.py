"""``launch resume RUN``: goes on from a run's last checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from launcher import start
from launcher.commands import nodes, request_of
from launcher.commands.parser import parser_of
from launcher.errors import RecipeError
from launcher.runs.run_dir import RunDir
from launcher.system import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.errors import Problem


def main(argv: Sequence[str]) -> int:
    """Run ``launch resume``; return its exit code."""
    parser = parser_of("resume", "Go on from a run's last checkpoint, at the same world size or another.")
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change what may change: optim.lr=0.001")
    parser.add_argument("--nodes", type=nodes, metavar="N|MIN:MAX")
    for flag, metavar in (("--spares", "N"), ("--gpus", "M"), ("--procs", "P")):
        parser.add_argument(flag, type=int, metavar=metavar)
    parser.add_argument("--backend", metavar="NAME")
    parser.add_argument("--profile", metavar="NAME", help="read this one (default: as the run was last launched)")
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--node-rank", type=int, default=0, metavar="K")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT")
    parser.add_argument(
        "--new-code", action="store_true", help="take your own code (model.factory and the like) anew from where it was"
    )
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_intermixed_args(argv)
    if not args.dry_run:
        console.protect()
    run = RunDir.existing(args.run_dir)
    plan = run.read_plan()
    request = request_of(args, recipe=str(run.recipe), run_id=plan.run_id, kept_profile=plan.profile)
    try:
        (reading,) = start.read(request)
    except RecipeError as error:
        raise RecipeError([_if_moved(problem, run) for problem in error.problems]) from None
    return start.carry_out(reading)


def _if_moved(problem: Problem, run: RunDir) -> Problem:
    """What to do about a file or folder that was there when the run began."""
    value = {"data.path": "FOLDER", "model.weights": "FILE"}.get(problem.key)
    cure = f"; if it was moved: launch resume {run} {problem.key}={value}" if value else ""
    return replace(problem, message=problem.message + cure)
