"""``launch RECIPE`` and ``launch resume RUN``: from a recipe to a plan that is printed or carried out."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import __version__
from launcher.commands import RECIPES
from launcher.errors import EXIT_OK, RecipeError, UsageError
from launcher.runs import history
from launcher.runs.run_dir import RunDir, new_run_id
from launcher.system import console, network, processes
from launcher.system.redact import find_secret, redact

if TYPE_CHECKING:
    from launcher.errors import Problem
    from launcher.plan.plan import LaunchPlan
    from launcher.plan.profile import Profile
    from launcher.recipe.schema import Recipe
    from launcher.recipe.source import Source


def run(argv: list[str], *, epilog: str) -> int:
    """Carry out a recipe; ``epilog`` ends the help."""
    parser = argparse.ArgumentParser(
        prog="launch",
        description="Fine-tune an image classifier as a recipe says, on this process, this machine or several.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one that `launch recipes` lists")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change the recipe: optim.lr=0.1")
    parser.add_argument("--nodes", type=int, metavar="N", help="machines")
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
    if not args.dry_run and not args.debug:  # which answers a question, and which may ask some (breakpoints)
        console.protect()
    _split_overrides(args)
    args.kept_profile, args.tune = None, False
    if args.sweep:
        from launcher.commands import sweep

        return sweep.run(args)
    with processes.importing():
        from launcher.recipe import load as recipes

    recipe, source = recipes.load(find_recipe(args.recipe), args.overrides, flags(args))
    if secret := find_secret(args.run_dir or ""):
        raise UsageError(f"--run-dir: {secret}, it seems, which would be written into files; name another folder")
    existing = RunDir(args.run_dir) if args.run_dir else None
    if existing and existing.exists and not args.node_rank:
        if not args.resume:
            raise UsageError(f"{existing}: holds a run already; go on with it by: launch resume {existing}")
        return carry_out(recipe, source, args, run_id=existing.run_id)
    return carry_out(recipe, source, args, run_id=new_run_id(recipe.name))


def resume(argv: list[str]) -> int:
    """Go on with a run."""
    parser = argparse.ArgumentParser(
        prog="launch resume",
        description="Go on from a run's last checkpoint, at the same world size or another.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change what may change: optim.lr=0.001")
    for flag, metavar in (("--nodes", "N"), ("--gpus", "M"), ("--procs", "P")):
        parser.add_argument(flag, type=int, metavar=metavar)
    parser.add_argument("--backend", metavar="NAME")
    parser.add_argument("--profile", metavar="NAME", help="read this one (default: as the run was last launched)")
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--node-rank", type=int, default=0, metavar="K")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_intermixed_args(argv)
    if not args.dry_run:
        console.protect()
    args.debug = args.tune = False
    _split_overrides(args)
    run = RunDir.existing(args.run_dir)
    args.kept_profile = run.read_plan().get("profile")
    from launcher.recipe import load as recipes

    try:
        recipe, source = recipes.load(str(run.recipe), args.overrides, flags(args))
    except RecipeError as error:
        raise RecipeError([_if_moved(problem, run) for problem in error.problems]) from None
    return carry_out(recipe, source, args, run_id=run.run_id)


def _if_moved(problem: Problem, run: RunDir) -> Problem:
    """What to do about a file or folder that was there when the run began."""
    value = {"data.path": "FOLDER", "model.weights": "FILE"}.get(problem.key)
    cure = f"; if it was moved: launch resume {run} {problem.key}={value}" if value else ""
    return replace(problem, message=problem.message + cure)


def _split_overrides(args: argparse.Namespace) -> None:
    """``profile.key=value`` changes the profile, all else the recipe."""
    args.profile_overrides = [item for item in args.overrides if item.startswith("profile.")]
    args.overrides = [item for item in args.overrides if not item.startswith("profile.")]


def plan_run(recipe: Recipe, args: argparse.Namespace, *, run_id: str, run_dir: str | None) -> LaunchPlan:
    """The plan of a recipe for this machine and this command line."""
    from launcher.plan import topology
    from launcher.plan.plan import Request, make_plan

    request = Request(
        run_id=run_id,
        run_dir=run_dir,
        node_rank=args.node_rank,
        rdzv_endpoint=args.rdzv_endpoint,
        debug=args.debug,
        tune=args.tune,
        detach=args.detach,
    )
    return make_plan(recipe, topology.detect(), request, *_profiles(recipe, args))


def carry_out(recipe: Recipe, source: Source, args: argparse.Namespace, *, run_id: str) -> int:
    """Plan, and print the plan or run it: one road for every backend."""
    from launcher import backends
    from launcher.backends.slurm import admission
    from launcher.commands import going_on
    from launcher.node import meeting
    from launcher.runs import quarantine, recipe_changes, whereabouts

    plan = plan_run(recipe, args, run_id=run_id, run_dir=args.run_dir)
    run = RunDir(plan.run_dir)
    changes = recipe_changes.find(run, recipe, source.where)
    if args.dry_run:
        print(plan)
        return EXIT_OK
    if run.exists and going_on.has_nothing_left(run, recipe):
        return EXIT_OK
    if run.exists and plan.node_rank == 0:
        whereabouts.refuse_second(run)
    if plan.backend == "torchrun" and plan.nodes > 1:
        meeting.check(plan.rdzv_endpoint, node_rank=plan.node_rank)
    network.set_environment(plan.env)  # before torch is imported: it reads its thread count then
    with processes.importing():
        checks = importlib.import_module("launcher.engine.recipe_checks")
    checks.check(recipe, source.where, is_new=run.newest_state() is None)
    checks.check_train_set(run, recipe, source.where)
    found = None
    if plan.script:
        admission.check(plan.to_dict(), run, plan.script, plan.post_script)
    else:
        if plan.backend == "slurm":
            admission.check_step(plan.to_dict())
        if plan.node_rank == 0:
            found = quarantine.check(recipe, source.where)
    if plan.node_rank == 0:
        write_run(plan, recipe)
        going_on.record(run, changes)
        if found:
            quarantine.record(run, recipe, found, attempt=history.next_attempt(run))
        print(f"run {plan.run_id}: {plan.world_size} workers on {plan.device}, in {plan.run_dir}", flush=True)
    else:
        print(f"node {plan.node_rank} of {plan.nodes}: joining the run in {plan.run_dir}", flush=True)
    return backends.load(plan.backend).submit(plan)


def _profiles(recipe: Recipe, args: argparse.Namespace) -> tuple[Profile | None, Profile | None]:
    """The profiles of the training and of the exports; the command line's ``profile.key=value`` changes the first."""
    from launcher.plan import profile

    name, post, overrides = recipe.launch.profile, recipe.post.profile, args.profile_overrides
    kept = args.kept_profile if args.profile is None else None
    if name is None and kept is None and overrides:
        raise UsageError(f"{overrides[0]}: there is no profile to change; add --profile NAME")
    found = profile.change(kept, overrides) if kept else profile.load(name, overrides) if name else None
    return found, profile.load(post) if post else None


def write_run(plan: LaunchPlan, recipe: Recipe) -> None:
    """Make the run directory with its plan and recipe."""
    import time

    from launcher.plan import variables
    from launcher.recipe import load as recipes
    from launcher.recipe import paths as recipe_paths
    from launcher.runs.run_dir import code_digest
    from launcher.system.files import write_json_atomic, write_text_atomic

    run = RunDir(plan.run_dir)
    if run.recipe.exists() and not run.plan.exists():
        raise UsageError(f"--run-dir {run}: holds a recipe.yaml that is no run's; name another folder")
    try:
        run.create()
    except OSError as error:
        raise UsageError(f"--run-dir {run}: cannot be made there: {error.strerror}: {error.filename}") from None
    # The recipe comes last: its presence says that the plan is there.
    facts = {
        "created": time.time(),
        "code": code_digest(),
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "process_started": processes.start_time(os.getpid()),
        "variables": sorted(set(variables.read_by_runs(os.environ)) - plan.env.keys()) if plan.script else [],
        "launched_by": redact(shlex.join(["launch", *sys.argv[1:]])),
    }
    try:
        write_json_atomic(run.plan, plan.to_dict() | facts, durable=True)
        before = run.read_status() if run.status.exists() else {"attempt": 0, "epoch": 0, "step": 0, "best": None}
        run.update_status(**before | {"state": "pending"})
        write_text_atomic(run.recipe, recipes.to_yaml(recipe_paths.absolute(recipe)), durable=True)
        run.append_event("launched", backend=plan.backend)
    except OSError as error:
        raise UsageError(f"--run-dir {run}: cannot be written to: {error.strerror}; nothing was started") from None


def flags(args: argparse.Namespace) -> dict[str, tuple[str, Any]]:
    """The flags as overrides of the recipe, each with its name for errors; ``--debug`` is a set of them."""
    names = ("nodes", "gpus", "procs", "backend", "profile")
    values = {name: getattr(args, name) for name in names}
    flags: dict[str, tuple[str, Any]] = {
        f"launch.{name}": (f"--{name}", value) for name, value in values.items() if value is not None
    }
    if args.debug:
        one = {"nodes": 1, "gpus": "auto", "procs": 1, "backend": "local", "profile": None}
        flags |= {f"launch.{name}": ("--debug", value) for name, value in one.items()}
    return flags


def find_recipe(name: str) -> str:
    """A path as it is; the bare name of a recipe that comes with the package, as its path there."""
    packaged = RECIPES / f"{name}.yaml"
    return str(packaged) if not Path(name).exists() and "/" not in name and packaged.is_file() else name
