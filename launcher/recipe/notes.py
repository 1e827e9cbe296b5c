"""What of a recipe has no part in a training: what that does not come to, and keys that nothing reads. No mistakes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.recipe import phases
from launcher.recipe.schema import OptimConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.recipe.phases import Phase
    from launcher.recipe.schema import Recipe

DOWN = ("cosine", "linear", "polynomial", "one_cycle", "cosine_restarts")
READ_BY = {
    "end_factor": DOWN,
    "step_epochs": ("step",),
    "step_factor": ("step",),
    "power": ("polynomial",),
    "cycles": ("cosine_restarts",),
    "cycle_growth": ("cosine_restarts",),
}
"""Keys of optim that some schedules read alone."""


def find_notes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys, and what of them a training as the recipe asks for does without.

    So any recipe can be tried with ``train.epochs=1``.
    """
    yield from _warmup(recipe)
    yield from _unread(recipe)
    yield from _phases_cut_off(recipe)
    epochs = recipe.train.epochs
    if recipe.train.swa is not None and recipe.train.swa >= epochs:
        yield "train.swa", f"its mean of the weights never begins: train.epochs is {epochs}"
    for late in sorted(epoch for epoch in recipe.model.unfreeze if epoch >= epochs):
        yield "model.unfreeze", f"epoch {late} never comes: train.epochs is {epochs}, counted from 0"


def _warmup(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Warm-ups that are longer than what they are of."""
    for one, key, whose in _courses(recipe, "warmup_epochs"):
        warmup, epochs = one.optim.warmup_epochs, one.course[1]
        if warmup > epochs:
            yield key, f"{warmup:g} epochs are more than {whose}: the rates end at {epochs / warmup:.0%} of theirs"


def _unread(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that were given for another schedule than there is, and drops that never come."""
    schedules, default = {one.optim.schedule for one in phases.phases(recipe)}, OptimConfig()
    for key, readers in READ_BY.items():
        if getattr(recipe.optim, key) != getattr(default, key) and not schedules & {*readers}:
            found = " and ".join(sorted(schedules))
            yield f"optim.{key}", f"no effect with optim.schedule={found}; it is read by {', '.join(readers)}"
    for one, key, whose in _courses(recipe, "step_epochs"):
        drops = one.optim.step_epochs
        if one.optim.schedule == "step" and drops != "auto":
            every = drops if isinstance(drops, list) else [drops]
            if late := [f"{epoch:g}" for epoch in every if epoch >= one.course[1]]:
                yield key, f"no drop at {', '.join(late)}, which is not less than {whose}"


def _courses(recipe: Recipe, key: str) -> Iterator[tuple[Phase, str, str]]:
    """Each course of learning rates with the key that a setting of it has, and what its length is called."""
    named = recipe.train.phases
    for number, one in enumerate(phases.phases(recipe)[: None if named else 1]):
        own = bool(named) and getattr(named[number].optim, key) is not None
        whose = f"the {one.course[1]} of train.phases.{number}" if named else f"train.epochs ({one.course[1]})"
        yield one, f"train.phases.{number}.optim.{key}" if own else f"optim.{key}", whose


def _phases_cut_off(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Phases that training ends in, or before."""
    begun = phases.phases(recipe)
    for number, one in enumerate(recipe.train.phases):
        key, epochs = f"train.phases.{number}", recipe.train.epochs
        if number >= len(begun):
            yield key, f"it never begins: train.epochs is {epochs}"
        elif one.epochs and one.epochs > begun[number].course[1]:
            yield key, f"{begun[number].course[1]} of its {one.epochs} epochs come: train.epochs is {epochs}"
