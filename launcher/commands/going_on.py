"""Going on with a run: whether there is anything left to do, and with what other recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.recipe import load as recipes
from launcher.runs import whereabouts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.recipe.schema import Recipe
    from launcher.runs.recipe_changes import Change
    from launcher.runs.run_dir import RunDir


def has_nothing_left(run: RunDir, recipe: Recipe) -> bool:
    """Whether a run is trained as far as ``recipe`` says; then says so, and what can be done with it."""
    state = run.read_status()["state"]
    if state not in whereabouts.TRAINED or run.read_plan()["debug"]:
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


def record(run: RunDir, changes: Sequence[Change]) -> None:
    """Say and write down with what other recipe the run goes on; forget what was measured for the one before."""
    for change in changes:
        print(f"recipe changed: {change}", flush=True)
        run.append_event("recipe_changed", key=change.key, old=change.old, new=change.new)
    if any(change.is_measured for change in changes):
        run.tuning.unlink(missing_ok=True)
