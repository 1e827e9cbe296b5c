"""The road of every run: its recipe is read, planned, admitted, recorded and submitted, whatever the backend."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import EXIT_OK, RecipeError, TrainingError, UsageError
from launcher.runs import history, states
from launcher.runs.identity import new_run_id
from launcher.runs.run_dir import RunDir
from launcher.system import git, lazy_dynamo, lazy_meta, network, phases, processes
from launcher.system.redact import redact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.images.scan import Scan
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.plan.profile import Profile
    from launcher.plan.request import Request
    from launcher.recipe.schema import Recipe
    from launcher.recipe.source import Source
    from launcher.runs.recipe_changes import Change
    from launcher.runs.user_code import Code

RECIPES = Path(__file__).parent / "recipes"
"""Folder of the recipes that come with this package."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is asked for, and the recipe that it names."""

    request: Request
    recipe: Recipe
    source: Source


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A run that is planned, of which nothing is written yet."""

    plan: LaunchPlan
    recipe: Recipe
    source: Source
    changes: Sequence[Change]
    """With what other recipe it goes on, where it does."""
    code: Code
    """Of the user's own, which the recipe names."""

    @property
    def run(self) -> RunDir:
        """Its run directory, which need not be there."""
        return RunDir(self.plan.run_dir)


def carry_out(reading: Reading) -> int:
    """Carry out a recipe that was read: plan it, and print the plan, or admit, record and submit it."""
    from launcher import backends
    from launcher.node import meeting

    draft = plan(reading)
    run, made = draft.run, draft.plan
    if reading.request.dry_run:
        print("\n".join(filter(None, [str(made), str(draft.code)])))
        return EXIT_OK
    if run.exists and has_nothing_left(run, draft.recipe):
        return EXIT_OK
    (found,) = admit([draft], [made.script, made.post_script])
    phases.end()
    if made.node_rank == 0 and not meeting.goes_on_elsewhere(run, made):
        record(draft, found)
        print(f"run {made.run_id}: {made.world_size} workers on {made.device}, in {made.run_dir}", flush=True)
    else:
        print(f"node {made.node_rank} of {made.nodes}: joining the run in {made.run_dir}", flush=True)
    return backends.load(made)(made)


def read(*requests: Request) -> list[Reading]:
    """Read the recipes that are asked for.

    Raises:
        RecipeError: names everything that is wrong with any of them.
    """
    phases.at("reading the recipe")
    with processes.importing():
        from launcher.recipe import load as recipes

    found, problems = [], {}
    for request in requests:
        try:
            has_begun = (
                bool(request.run_id and request.run_dir) and RunDir(str(request.run_dir)).newest_state() is not None
            )
            file, flags = find_recipe(request.recipe), request.flags()
            recipe, source = recipes.load(file, request.overrides, flags, has_begun=has_begun)
            found.append(Reading(request=request, recipe=recipe, source=source))
        except RecipeError as error:
            problems.update({str(problem): problem for problem in error.problems})
    if problems:
        raise RecipeError(list(problems.values()))
    return found


def plan(reading: Reading) -> Draft:
    """Plan a recipe for this machine and this command line; nothing is written."""
    from launcher.plan import topology
    from launcher.plan.plan import make_plan
    from launcher.runs import recipe_changes, user_copies

    recipe, request = reading.recipe, reading.request
    if not request.run_id:
        request = replace(request, run_id=new_run_id(recipe.name))
    made = make_plan(recipe, topology.detect(), request, *_profiles(recipe, request))
    run = RunDir(made.run_dir)
    recipe, code = user_copies.gather(recipe, reading.source, run, renew=request.new_code)
    changes = recipe_changes.find(run, recipe, reading.source.where)
    return Draft(plan=made, recipe=recipe, source=reading.source, changes=changes, code=code)


def admit(drafts: Sequence[Draft], scripts: Sequence[str]) -> list[Scan | None]:
    """Check everything that can be checked before the first of some runs is written or started.

    Args:
        drafts: the runs, all for the same backend.
        scripts: what SLURM will be given for all of them.

    Returns:
        For each run what was found among its images; None where its first node looks through them.

    Raises:
        LaunchError: one of the runs cannot be carried out.
    """
    from launcher.backends import living
    from launcher.backends.slurm import admission
    from launcher.node import meeting

    first = drafts[0].plan
    for draft in drafts:
        if draft.run.exists and draft.plan.node_rank == 0:
            living.refuse_second(draft.run)
    if first.backend == "torchrun" and first.nodes > 1:
        meeting.check(first.rdzv_endpoint, node_rank=first.node_rank)
    network.set_environment(first.env)  # before torch is imported: it reads its thread count then
    for draft in drafts:
        _check_with_torch(draft)
    if first.script:
        admission.check(first, drafts[0].run, *scripts)
        return [None for _ in drafts]
    if first.backend == "slurm":
        for draft in drafts:
            admission.check_step(draft.plan)
    return [None for _ in drafts] if first.node_rank else _look_through_images(drafts)


def _check_with_torch(draft: Draft) -> None:
    """Check what only torch and the user's own code can tell; what that code raises is left in the run directory."""
    phases.at("importing torch")
    lazy_dynamo.put_off()
    lazy_meta.put_off()
    with processes.importing():
        from launcher.engine import recipe_checks
        from launcher.engine.user import trial
    phases.at("checking the recipe against the model")
    run, where = draft.run, draft.source.where
    tell_of_ignored(draft.recipe, draft.source)
    try:
        is_new = run.newest_state() is None
        recipe_checks.check(draft.recipe, where, is_new=is_new, code=draft.code, place=run.path)
    except trial.UserCodeError as error:
        if draft.plan.node_rank:  # node 0 leaves it in the run directory
            raise
        if not draft.plan.debug:  # with which it comes again, in this process
            write_run(draft.plan, draft.recipe, draft.code)
            raise record_failure(run, error.record) from None
    recipe_checks.check_train_set(run, draft.recipe, where)


def _look_through_images(drafts: Sequence[Draft]) -> list[Scan | None]:
    """What is found among each run's images; those that several runs have in common are looked through once."""
    from launcher.runs import quarantine

    found: dict[str, Scan | None] = {}
    for draft in drafts:
        if repr(draft.recipe.data) not in found:
            found[repr(draft.recipe.data)] = quarantine.check(draft.recipe, draft.source.where)
    return [found[repr(draft.recipe.data)] for draft in drafts]


def record(draft: Draft, found: Scan | None) -> None:
    """Write the run directory, with what was found among the images."""
    from launcher.runs import quarantine, user_code

    run = draft.run
    write_run(draft.plan, draft.recipe, draft.code)
    user_code.tell_of_changes(run, draft.code.changed, is_new=draft.code.is_new)
    record_changes(run, draft.changes)
    if found:
        quarantine.record(run, draft.recipe, found, attempt=history.next_attempt(run))


def tell_of_ignored(recipe: Recipe, source: Source) -> None:
    """Say which keys mean nothing beside the user's own model, data set or transform, or nothing in this training."""
    from launcher.recipe import notes

    model, data = recipe.model, recipe.data
    ignored = {"model.arch": model.factory, "data.name": data.dataset, "data.augment": data.transform}
    ignored |= {"data.crop_pct": data.transform}
    steps = ("crop_scale", "flip", "rotate", "auto_augment", "color_jitter", "erase")
    ignored |= {f"data.{step}": data.transform for step in steps}
    if Path(source.path).with_name("plan.json").exists():  # a run's own recipe, which has every key
        return
    for key, reference in ignored.items():
        if reference and key in source.origins:
            print(f"{source.where(key)}: {key} is ignored: {reference} takes its place", flush=True)
    for key, text in notes.find_notes(recipe):
        print(f"{source.where(key)}: {key}: {text}", flush=True)


def record_failure(run: RunDir, record: dict[str, Any]) -> TrainingError:
    """Leave in a run that the user's code raised before its workers were started; return what to tell."""
    import time

    from launcher.node import finish
    from launcher.runs import diagnose
    from launcher.system.files import write_json_atomic

    attempt = history.next_attempt(run)
    file, who = run.rank_error(attempt, 0), {"attempt": attempt, "node": 0, "rank": 0, "host": os.uname().nodename}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file, {"time": time.time(), **who, **record})
    run.rank_log(attempt, 0).parent.mkdir(parents=True, exist_ok=True)
    run.rank_log(attempt, 0).write_text(record["traceback"], encoding="utf-8")
    run.append_event("attempt_started", attempt=attempt, node=0, workers=0)
    cause, message = diagnose.cause_of_end(run, attempt)
    run.append_event("attempt_ended", attempt=attempt, node=0, cause=cause, message=message)
    states.move(run, "failed", attempt=attempt)
    return TrainingError(
        f"your own code failed, before training began\n{diagnose.explain(run)}\nmore: launch why {run}"
        f"{finish.report_of_failure(run)}"
    )


def has_nothing_left(run: RunDir, recipe: Recipe) -> bool:
    """Whether a run is trained as far as ``recipe`` says; then says so, and what can be done with it."""
    from launcher.recipe import load as recipes
    from launcher.runs import whereabouts

    status = run.read_status()
    state = status["state"]
    if state not in whereabouts.TRAINED or run.read_plan().debug:
        return False
    if not states.is_tested(status, recipe.data.test, status.get("best")):
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


def _profiles(recipe: Recipe, request: Request) -> tuple[Profile | None, Profile | None]:
    """The profiles of the training and of the exports; the command line's ``profile.key=value`` changes the first."""
    from launcher.plan import profile

    name, post, overrides = recipe.launch.profile, recipe.post.profile, request.profile_overrides
    kept = request.kept_profile if request.profile is None else None
    if name is None and kept is None and overrides:
        raise UsageError(f"{overrides[0]}: there is no profile to change; add --profile NAME")
    found = profile.change(kept, overrides) if kept else profile.load(name, overrides) if name else None
    return found, profile.load(post) if post else None


def write_run(plan: LaunchPlan, recipe: Recipe, code: Code | None = None) -> None:
    """Make the run directory with its plan, the user's code and the recipe."""
    import time

    from launcher.plan import variables
    from launcher.plan.launch_plan import Launched
    from launcher.recipe import load as recipes
    from launcher.recipe import paths as recipe_paths
    from launcher.runs.identity import code_digest
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
        commit=git.commit(),
    )
    try:
        run.write_plan(plan, launched)
        new = {} if run.status.exists() else {"epoch": 0, "step": 0, "best": None}
        # The last attempt that the history knows of, by which a late word of an earlier one is told.
        run.update_status(attempt=history.next_attempt(run) - 1, **new)
        states.move(run, "pending")
        if code:
            code.write(run.code)
        write_text_atomic(run.recipe, recipes.to_yaml(recipe_paths.absolute(recipe)), durable=True)
        run.append_event("launched", backend=plan.backend)
    except OSError as error:
        raise UsageError(f"--run-dir {run}: cannot be written to: {error.strerror}; nothing was started") from None


def recipes() -> list[Path]:
    """The recipes that come with the package."""
    return sorted(RECIPES.rglob("*.yaml"))


def find_recipe(name: str) -> str:
    """A path as it is; for NAME, or recipes/NAME.yaml that is not here, the recipe that comes with the package."""
    path = Path(name)
    packaged = RECIPES / f"{path.stem if path == Path('recipes', f'{path.stem}.yaml') else name}.yaml"
    return str(packaged) if not path.exists() and packaged.parent == RECIPES and packaged.is_file() else name
