"""``launch RECIPE`` and ``launch resume RUN``: from a recipe to a plan that is printed or carried out."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from launcher import __version__
from launcher.commands import no_recipe, nodes, request_of
from launcher.commands.parser import Parser
from launcher.errors import UsageError
from launcher.system import console, phases
from launcher.system.redact import find_secret

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def main(argv: Sequence[str], *, epilog: str, commands: Iterable[str]) -> int:
    """Carry out a recipe; ``epilog`` ends the help, ``commands`` are those beside this one."""
    parser = Parser(
        prog="launch",
        description="Fine-tune an image classifier as a recipe says, on this process, this machine or several.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one that `launch recipes` lists")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change the recipe: optim.lr=0.1")
    parser.add_argument(
        "--nodes",
        type=nodes,
        metavar="N|MIN:MAX",
        help="machines; 2:4: go on while 2 of 4 are left, take in what returns",
    )
    parser.add_argument("--spares", type=int, metavar="N", help="machines more, which take the place of lost ones")
    parser.add_argument("--gpus", type=int, metavar="M", help="GPUs per node, one worker each")
    parser.add_argument("--procs", type=int, metavar="P", help="workers per node, on whatever device the recipe names")
    parser.add_argument("--backend", metavar="NAME", help="auto, local, torchrun or slurm")
    parser.add_argument("--profile", metavar="NAME", help="profile of the SLURM cluster: a name or a path")
    parser.add_argument(
        "--detach", action="store_true", help="run in the background, or as a job that nobody waits for"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="where the run's files go (default: runs/NAME-TIME-xxxx)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir where there is one")
    parser.add_argument("--node-rank", type=int, default=0, metavar="K", help="which node this is, without SLURM")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the nodes meet, without SLURM")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; write and start nothing")
    parser.add_argument("--debug", action="store_true", help="a few steps in this process; breakpoints work")
    parser.add_argument("--sweep", action="store_true", help="a run for every combination of key=a,b,c; then compare")
    parser.add_argument("--parallel", type=int, metavar="N", help="runs of a sweep at the same time, on SLURM")
    parser.add_argument("--version", action="version", version=f"finetune-launcher {__version__}")
    args = parser.parse_intermixed_args(argv)
    no_recipe.refuse(args.recipe, args.overrides, commands)
    if not args.dry_run and not args.debug:  # which answers a question, and which may ask some (breakpoints)
        console.protect()
        phases.show()
    if secret := find_secret(args.run_dir or ""):
        raise UsageError(f"--run-dir: {secret}, which would be written into files; name another folder")
    if args.sweep:
        from launcher.commands import sweep

        return sweep.run(request_of(args), parallel=args.parallel)
    from launcher import start

    (reading,) = start.read(request_of(args, run_id=_run_id_of(args)))
    return start.carry_out(reading)


def _run_id_of(args: argparse.Namespace) -> str:
    """The id of the run to go on with; empty: there is none yet.

    Raises:
        UsageError: the run directory cannot be that of this run.
    """
    from launcher.node import meeting
    from launcher.runs.run_dir import RunDir

    existing = RunDir(args.run_dir) if args.run_dir else None
    if existing is None or not existing.exists or args.node_rank:
        return ""
    if not args.resume and not meeting.goes_on_elsewhere(existing, existing.read_plan()):
        raise UsageError(f"{existing}: holds a run already; go on with it by: launch resume {existing}")
    return existing.run_id
