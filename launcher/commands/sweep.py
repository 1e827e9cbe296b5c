"""``launch RECIPE key=a,b,c --sweep``: one run for every combination, as a job array or one after the other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import start
from launcher.backends.slurm import client as slurm_client
from launcher.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_RESUMABLE,
    InterruptedRunError,
    LaunchError,
    RecipeError,
    UsageError,
)
from launcher.plan import batch_script, sweep
from launcher.runs import history
from launcher.runs.run_dir import RunDir, new_run_id
from launcher.system import network, processes
from launcher.system.files import write_text_atomic

if TYPE_CHECKING:
    import argparse

    from launcher.plan.launch_plan import LaunchPlan
    from launcher.recipe.schema import Recipe
    from launcher.recipe.source import Source


def run(args: argparse.Namespace) -> int:
    """Carry a sweep out, and compare its runs; exit code 0 where all of them ended well.

    Raises:
        RecipeError: names everything that is wrong with any of the runs.
        UsageError: the combinations, or where they would go, are wrong.
    """
    combinations = sweep.expand(args.overrides)
    loaded = _load_all(args, combinations)
    base = Path(args.run_dir or Path("runs") / new_run_id(f"{loaded[0][0].name}-sweep"))
    if base.exists():
        raise UsageError(f"--run-dir {base}: is there already; a sweep makes a folder of its own")
    plans = [
        start.plan_run(recipe, args, run_id=f"{base.name}-{label}", run_dir=str(base / label))
        for (recipe, _), label in zip(loaded, sweep.labels(combinations), strict=True)
    ]
    arrays = _arrays(plans, base, args.parallel or len(plans)) if plans[0].script else []
    if args.dry_run:
        _print_plans(plans, combinations, [script for script, _ in arrays])
        return EXIT_OK
    if args.detach and not arrays:
        raise UsageError("--detach: without SLURM a sweep's runs are started here one after the other; leave it out")
    _check_all(plans, loaded, [script for script, _ in arrays])
    for plan, (recipe, _) in zip(plans, loaded, strict=True):
        start.write_run(plan, recipe)
    runs = [RunDir(plan.run_dir) for plan in plans]
    write_text_atomic(base / batch_script.RUNS, "".join(f"{found.path}\n" for found in runs))
    if arrays:
        from launcher.backends.slurm import submit

        posts = [plan.post_script for plan in plans]
        if not submit.submit_arrays(base, arrays, posts, detach=args.detach, in_turn=bool(args.parallel)):
            return EXIT_OK
    else:
        _run_one_after_the_other(plans)
    from launcher.commands import compare

    compare.run([str(base)], metric=None, as_json=False)
    return _exit_code(runs)


def _print_plans(plans: list[LaunchPlan], combinations: list[tuple[str, ...]], scripts: list[str]) -> None:
    """What ``--dry-run`` prints: each run with its settings, then what is submitted, or the first of the runs."""
    for plan, combination in zip(plans, combinations, strict=True):
        print(f"{plan.run_dir}: {' '.join(combination)}")
    if plans[0].post_script:
        print(f"\nscript of the exports of the first\n{plans[0].post_script}", end="")
    for script in scripts:
        print(f"\nscript\n{script}", end="")
    if not scripts:
        print(f"\nthe first of {len(plans)}, one after the other\n{plans[0]}")


def _load_all(args: argparse.Namespace, combinations: list[tuple[str, ...]]) -> list[tuple[Recipe, Source]]:
    with processes.importing():
        from launcher.recipe import load as recipes

    loaded, problems = [], {}
    for combination in combinations:
        try:
            loaded.append(recipes.load(start.find_recipe(args.recipe), combination, start.flags(args)))
        except RecipeError as error:
            problems.update({str(problem): problem for problem in error.problems})
    if problems:
        raise RecipeError(list(problems.values()))
    return loaded


def _arrays(plans: list[LaunchPlan], base: Path, parallel: int) -> list[tuple[str, list[RunDir]]]:
    """The scripts of as few job arrays as the cluster allows for so many runs, each with its runs."""
    from launcher.plan import profile as profiles

    first = plans[0]
    job = batch_script.Job(
        name=base.name,
        run_dir=str(base.absolute()),
        nodes=first.nodes,
        procs_per_node=first.procs_per_node,
        device=first.device,
        python=sys.executable,
    )
    if any(plan.profile != first.profile for plan in plans):
        raise UsageError("--sweep: the runs of a job array have one profile; launch.profile cannot be swept")
    shapes = {(plan.nodes, plan.procs_per_node, plan.device) for plan in plans}
    if len(shapes) > 1:
        raise UsageError("--sweep: the runs of a job array have one size; launch.nodes and the like cannot be swept")
    profile = first.profile or profiles.Profile()
    runs, size = [RunDir(plan.run_dir) for plan in plans], slurm_client.max_array_size()
    parts = {first: runs[first : first + size] for first in range(0, len(runs), size)}
    return [
        (
            batch_script.build_script(job, profile, batch_script.Array(num=len(part), parallel=parallel, first=first)),
            part,
        )
        for first, part in parts.items()
    ]


def _check_all(plans: list[LaunchPlan], loaded: list[tuple[Recipe, Source]], scripts: list[str]) -> None:
    from launcher.backends.slurm import admission
    from launcher.runs import quarantine

    network.set_environment(plans[0].env)
    with processes.importing():
        from launcher.engine import recipe_checks
    for recipe, source in loaded:
        recipe_checks.check(recipe, source.where)
    if scripts:
        admission.check(plans[0], RunDir(plans[0].run_dir), *scripts, plans[0].post_script)
        return
    if plans[0].backend == "slurm":
        admission.check_step(plans[0])
    for recipe, source in {recipe.data: (recipe, source) for recipe, source in loaded}.values():
        quarantine.check(recipe, source.where)


def _run_one_after_the_other(plans: list[LaunchPlan]) -> None:
    from launcher import backends

    for number, plan in enumerate(plans, start=1):
        print(f"\nrun {number} of {len(plans)}: {plan.run_dir}", flush=True)
        try:
            backends.load(plan)(plan)
        except InterruptedRunError:
            raise  # all of them are meant
        except LaunchError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)  # one that fails keeps no other from running


def _exit_code(runs: list[RunDir]) -> int:
    """That of a single run where all ended alike; else of those that did not end well the worst."""
    bad = [run.read_status()["state"] for run in runs if not _is_done(run)]
    if not bad:
        return EXIT_OK
    return EXIT_RESUMABLE if all(state in ("preempted", "cancelled") for state in bad) else EXIT_FAILED


def _is_done(run: RunDir) -> bool:
    """Whether it is trained, and has its exports where they are the part of another job."""
    is_whole = run.export_manifest.exists() or not run.read_plan().post_job
    return bool(history.events(run, "completed")) and is_whole
