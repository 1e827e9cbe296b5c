"""A training's phases: in each the same layers learn, by the same optimizer settings.

``train.phases`` names them; ``model.freeze`` and ``model.unfreeze`` are short for some whose learning rates have one
course together. All who ask what learns, or how, ask here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.recipe.schema import OptimConfig, Recipe
    from launcher.recipe.schema_model import ModelConfig
    from launcher.recipe.schema_train import PhaseConfig


@dataclass(frozen=True, kw_only=True)
class Freezing:
    """What does not learn from an epoch on."""

    start: int
    """The epoch, from 0."""
    freeze: tuple[str, ...]
    """Patterns of the layers that do not learn."""
    learn: tuple[str, ...] = ()
    """Patterns of those of them that do all the same."""


@dataclass(frozen=True, kw_only=True)
class Phase(Freezing):
    """A part of training."""

    optim: OptimConfig
    """Its optimizer settings."""
    course: tuple[int, int]
    """Where the course of its learning rates begins, and how many epochs that has."""


Kind = TypeVar("Kind", bound=Freezing)


def freezings(model: ModelConfig) -> list[Freezing]:
    """What ``model.freeze`` and ``model.unfreeze`` say, in the order of the epochs."""
    found = [Freezing(start=0, freeze=tuple(model.freeze))]
    for epoch, patterns in sorted(model.unfreeze.items()):
        names = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        found.append(replace(found[-1], start=epoch, learn=found[-1].learn + names))
    return found[1:] if len(found) > 1 and found[1].start == 0 else found


def phases(recipe: Recipe) -> list[Phase]:
    """Those that begin before training ends, in their order; the first begins with epoch 0."""
    epochs = recipe.train.epochs
    if recipe.train.phases:
        return list(_named(recipe))
    return [
        Phase(start=one.start, freeze=one.freeze, learn=one.learn, optim=recipe.optim, course=(0, epochs))
        for one in freezings(recipe.model)
        if one.start < epochs
    ]


def settings(recipe: Recipe) -> list[OptimConfig]:
    """The optimizer settings of each of ``train.phases``, those that never begin too; without any, ``optim``."""
    return [_settings_of(recipe, one) for one in recipe.train.phases] or [recipe.optim]


def phase_at(recipe: Recipe, epoch: int) -> Phase:
    """The phase that an epoch is in; after the last epoch it is the last one."""
    return at(phases(recipe), epoch)


def at(every: Sequence[Kind], epoch: int) -> Kind:
    """The last of them that has begun in an epoch."""
    return next((one for one in reversed(every) if one.start <= epoch), every[0])


def _named(recipe: Recipe) -> Iterator[Phase]:
    start = 0
    for one in recipe.train.phases:
        left = recipe.train.epochs - start
        if left <= 0:
            return
        length = min(one.epochs or left, left)
        optim = _settings_of(recipe, one)
        yield Phase(start=start, freeze=tuple(one.freeze), optim=optim, course=(start, length))
        start += length


def _settings_of(recipe: Recipe, phase: PhaseConfig) -> OptimConfig:
    changed = {key: value for key, value in asdict(phase.optim).items() if value is not None}
    return replace(recipe.optim, **changed)
