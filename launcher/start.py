"""The road of every run: its recipe is read, planned, admitted, recorded and submitted, whatever the backend."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import EXIT_OK, UsageError
from launcher.runs import history
from launcher.runs.run_dir import RunDir
from launcher.system import network, processes
from launcher.system.redact import redact

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from launcher.plan.launch_plan import LaunchPlan
    from launcher.plan.profile import Profile
    from launcher.recipe.schema import Recipe
    from launcher.recipe.source import Source
    from launcher.runs.recipe_changes import Change

RECIPES = Path(__file__).parent / "recipes"
"""Folder of the recipes that come with this package."""


def split_overrides(args: argparse.Namespace) -> None:
    """``profile.key=value`` changes the profile, all else the recipe."""
    args.profile_overrides = [item for item in args.overrides if item.startswith("profile.")]
    args.overrides = [item for item in args.overrides if not item.startswith("profile.")]


def plan_run(recipe: Recipe, args: argparse.Namespace, *, run_id: str, run_dir: str | None) -> LaunchPlan:
    """The plan of a recipe for this machine and this command line."""
    from launcher.plan import topology
    from launcher.plan.plan import make_plan
    from launcher.plan.request import Request

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
    from launcher.backends import living
    from launcher.backends.slurm import admission
    from launcher.node import meeting
    from launcher.runs import quarantine, recipe_changes

    plan = plan_run(recipe, args, run_id=run_id, run_dir=args.run_dir)
    run = RunDir(plan.run_dir)
    changes = recipe_changes.find(run, recipe, source.where)
    if args.dry_run:
        print(plan)
        return EXIT_OK
    if run.exists and has_nothing_left(run, recipe):
        return EXIT_OK
    if run.exists and plan.node_rank == 0:
        living.refuse_second(run)
    if plan.backend == "torchrun" and plan.nodes > 1:
        meeting.check(plan.rdzv_endpoint, node_rank=plan.node_rank)
    network.set_environment(plan.env)  # before torch is imported: it reads its thread count then
    with processes.importing():
        from launcher.engine import recipe_checks
    recipe_checks.check(recipe, source.where, is_new=run.newest_state() is None)
    recipe_checks.check_train_set(run, recipe, source.where)
    found = None
    if plan.script:
        admission.check(plan, run, plan.script, plan.post_script)
    else:
        if plan.backend == "slurm":
            admission.check_step(plan)
        if plan.node_rank == 0:
            found = quarantine.check(recipe, source.where)
    if plan.node_rank == 0:
        write_run(plan, recipe)
        record_changes(run, changes)
        if found:
            quarantine.record(run, recipe, found, attempt=history.next_attempt(run))
        print(f"run {plan.run_id}: {plan.world_size} workers on {plan.device}, in {plan.run_dir}", flush=True)
    else:
        print(f"node {plan.node_rank} of {plan.nodes}: joining the run in {plan.run_dir}", flush=True)
    return backends.load(plan)(plan)


def has_nothing_left(run: RunDir, recipe: Recipe) -> bool:
    """Whether a run is trained as far as ``recipe`` says; then says so, and what can be done with it."""
    from launcher.recipe import load as recipes
    from launcher.runs import whereabouts

    state = run.read_status()["state"]
    if state not in whereabouts.TRAINED or run.read_plan().debug:
        return False
    before, now = recipes.read_resolved(run.recipe).train, recipe.train
    if state == "early_stopped":
        if now.early_stopping != before.early_stopping:
            return False
        more = "train.early_stopping.patience=N"
    else:
        if now.epochs > before.epochs:
            return False
        more = "train.epochs=N"
    print(
        f"{run}: {state} already; its exports again: launch export {run}; its report: launch report {run}; "
        f"to train it further: launch RECIPE {more} --resume --run-dir {run}"
    )
    return True


def record_changes(run: RunDir, changes: Sequence[Change]) -> None:
    """Say and write down with what other recipe the run goes on; forget what was measured for the one before."""
    for change in changes:
        print(f"recipe changed: {change}", flush=True)
        run.append_event("recipe_changed", key=change.key, old=change.old, new=change.new)
    if any(change.is_measured for change in changes):
        run.tuning.unlink(missing_ok=True)


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
    from launcher.plan.launch_plan import Launched
    from launcher.recipe import load as recipes
    from launcher.recipe import paths as recipe_paths
    from launcher.runs.run_dir import code_digest
    from launcher.system.files import write_text_atomic

    run = RunDir(plan.run_dir)
    if run.recipe.exists() and not run.plan.exists():
        raise UsageError(f"--run-dir {run}: holds a recipe.yaml that is no run's; name another folder")
    try:
        run.create()
    except OSError as error:
        raise UsageError(f"--run-dir {run}: cannot be made there: {error.strerror}: {error.filename}") from None
    # The recipe comes last: its presence says that the plan is there.
    launched = Launched(
        created=time.time(),
        code=code_digest(),
        host=os.uname().nodename,
        pid=os.getpid(),
        process_started=processes.start_time(os.getpid()),
        variables=sorted(set(variables.read_by_runs(os.environ)) - plan.env.keys()) if plan.script else [],
        launched_by=redact(shlex.join(["launch", *sys.argv[1:]])),
    )
    try:
        run.write_plan(plan, launched)
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
