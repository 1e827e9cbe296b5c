"""``launch RECIPE key=a,b,c --sweep``: one run for every combination, as a job array or one after the other."""

from __future__ import annotations

import sys
from dataclasses import replace
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
    UsageError,
)
from launcher.plan import batch_script, sweep
from launcher.runs import history
from launcher.runs.identity import new_run_id
from launcher.runs.run_dir import RunDir
from launcher.system.files import write_text_atomic

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.plan.request import Request
    from launcher.start import Reading


def run(request: Request, *, parallel: int | None) -> int:
    """Carry a sweep out, and compare its runs; exit code 0 where all of them ended well.

    Args:
        request: its overrides may name several values for a key.
        parallel: how many runs of a job array may run at the same time; None: all.

    Raises:
        RecipeError: names everything that is wrong with any of the runs.
        UsageError: the combinations, or where they would go, are wrong.
    """
    combinations = sweep.expand(request.overrides)
    readings = start.read(*(replace(request, overrides=combination) for combination in combinations))
    base = Path(request.run_dir or Path("runs") / new_run_id(f"{readings[0].recipe.name}-sweep"))
    if base.exists():
        raise UsageError(f"--run-dir {base}: is there already; a sweep makes a folder of its own")
    drafts = [
        start.plan(_placed(reading, base, label))
        for reading, label in zip(readings, sweep.labels(combinations), strict=True)
    ]
    plans, runs = [draft.plan for draft in drafts], [draft.run for draft in drafts]
    arrays = _arrays(plans, base, parallel or len(plans)) if plans[0].script else []
    scripts = [script for script, _ in arrays]
    if request.dry_run:
        _print_plans(plans, combinations, scripts)
        codes = dict.fromkeys(filter(None, (str(draft.code) for draft in drafts)))
        print("\n".join(codes), end="\n" if codes else "")
        return EXIT_OK
    if request.detach and not arrays:
        raise UsageError("--detach: without SLURM a sweep's runs are started here one after the other; leave it out")
    for draft, found in zip(drafts, start.admit(drafts, [*scripts, plans[0].post_script]), strict=True):
        start.record(draft, found)
    write_text_atomic(base / batch_script.RUNS, "".join(f"{found.path}\n" for found in runs))
    if arrays:
        from launcher.backends.slurm import submit

        posts = [plan.post_script for plan in plans]
        if not submit.submit_arrays(base, arrays, posts, detach=request.detach, in_turn=bool(parallel)):
            return EXIT_OK
    else:
        _run_one_after_the_other(plans)
    from launcher.commands import compare

    compare.run([str(base)], metric=None, as_json=False)
    return _exit_code(runs)


def _placed(reading: Reading, base: Path, label: str) -> Reading:
    """One of the sweep's runs in a folder of its own."""
    place = replace(reading.request, run_id=f"{base.name}-{label}", run_dir=str(base / label))
    return replace(reading, request=place)


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


def _arrays(plans: list[LaunchPlan], base: Path, parallel: int) -> list[tuple[str, list[RunDir]]]:
    """The scripts of as few job arrays as the cluster allows for so many runs, each with its runs."""
    from launcher.plan import profile as profiles

    first = plans[0]
    job = batch_script.Job(
        name=base.name,
        run_dir=str(base.absolute()),
        nodes=first.machines,
        is_elastic=first.is_elastic,
        procs_per_node=first.procs_per_node,
        device=first.device,
        python=sys.executable,
    )
    if any(plan.profile != first.profile for plan in plans):
        raise UsageError("--sweep: the runs of a job array have one profile; launch.profile cannot be swept")
    shapes = {(plan.nodes, plan.min_nodes, plan.spares, plan.procs_per_node, plan.device) for plan in plans}
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
