"""Whether there is anything to go on with: a run that is trained needs no nodes, and no queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher import recipe as recipes
from launcher import whereabouts

if TYPE_CHECKING:
    from launcher.recipe import Recipe
    from launcher.run_dir import RunDir


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
