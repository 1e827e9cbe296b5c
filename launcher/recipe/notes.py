"""What of a recipe has no part in a training: what that does not come to, and keys that nothing reads. No mistakes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.recipe import phases
from launcher.recipe.schema import OptimConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
    for key, courses in _courses(recipe, "warmup_epochs").items():
        short = [(one, where) for one, where in courses if one.optim.warmup_epochs > one.course[1]]
        if short:
            warmup = short[0][0].optim.warmup_epochs
            whose = [
                f"the {one.course[1]} of {where}" if where else f"train.epochs ({one.course[1]})"
                for one, where in short
            ]
            ends = [f"{one.course[1] / warmup:.0%}" for one, _ in short]
            yield key, f"{warmup:g} epochs are more than {_and(whose)}: the rates end at {_and(ends)} of theirs"


def _unread(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that were given for another schedule than there is, and drops that never come."""
    settings, default = phases.settings(recipe), OptimConfig()
    schedules = {one.schedule for one in settings}
    for key, readers in READ_BY.items():
        read_by = f"it is read by {', '.join(readers)}"
        if getattr(recipe.optim, key) != getattr(default, key) and not schedules & {*readers}:
            yield f"optim.{key}", f"no effect with optim.schedule={_and(sorted(schedules))}; {read_by}"
        for number, (phase, one) in enumerate(zip(recipe.train.phases, settings, strict=False)):
            if getattr(phase.optim, key) is not None and one.schedule not in readers:
                yield f"train.phases.{number}.optim.{key}", f"no effect with schedule={one.schedule}; {read_by}"
    for key, courses in _courses(recipe, "step_epochs").items():
        if late := [text for one, where in courses if (text := _late_drops(one, where))]:
            yield key, "; ".join(late)


def _late_drops(one: Phase, where: str) -> str:
    """What of a course's drops never comes; empty: all come."""
    drops, epochs = one.optim.step_epochs, one.course[1]
    if one.optim.schedule != "step" or drops == "auto":
        return ""
    late = [f"{epoch:g}" for epoch in (drops if isinstance(drops, list) else [drops]) if epoch >= epochs]
    if not late:
        return ""
    what = f"its drop at {late[0]} never comes" if len(late) == 1 else f"its drops at {_and(late)} never come"
    return f"{what} in {where}, which has {epochs} epochs" if where else f"{what}: train.epochs is {epochs}"


def _courses(recipe: Recipe, key: str) -> dict[str, list[tuple[Phase, str]]]:
    """The courses of learning rates by the key that a setting of them has, each with its phase's key, if it has one."""
    named = recipe.train.phases
    found: dict[str, list[tuple[Phase, str]]] = {}
    for number, one in enumerate(phases.phases(recipe)[: None if named else 1]):
        own = bool(named) and getattr(named[number].optim, key) is not None
        where = f"train.phases.{number}" if named else ""
        found.setdefault(f"{where}.optim.{key}" if own else f"optim.{key}", []).append((one, where))
    return found


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)


def _phases_cut_off(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Phases that training ends in, or before."""
    begun = phases.phases(recipe)
    for number, one in enumerate(recipe.train.phases):
        key, epochs = f"train.phases.{number}", recipe.train.epochs
        if number >= len(begun):
            yield key, f"it never begins: train.epochs is {epochs}"
        elif one.epochs and one.epochs > begun[number].course[1]:
            yield key, f"{begun[number].course[1]} of its {one.epochs} epochs come: train.epochs is {epochs}"
