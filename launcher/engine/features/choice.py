"""When features are kept: follows from the recipe alone, so that a resumed run does as an undisturbed one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.engine.model import FineTunedModel
    from launcher.recipe.schema import Recipe


def frozen_epochs(recipe: Recipe, model: FineTunedModel) -> int:
    """How many epochs from the first on have the same layers frozen; 0: none is."""
    if not model.frozen_parameters(0):
        return 0
    later = sorted(epoch for epoch in recipe.model.unfreeze if 0 < epoch < recipe.train.epochs)
    first = model.frozen_parameters(0)
    return next((epoch for epoch in later if model.frozen_parameters(epoch) != first), recipe.train.epochs)


def num_views(recipe: Recipe) -> int:
    """How many views of a training image are kept; 0: none."""
    if recipe.train.feature_views == "auto":
        return 0 if why_random(recipe) else 1
    return recipe.train.feature_views


def why_random(recipe: Recipe) -> str | None:
    """The key by which a training image may look different in every epoch; None: it looks the same."""
    data = recipe.data
    own = next((f"data.{name}" for name in ("transform", "dataset") if getattr(data, name)), None)
    return own or (f"data.augment={data.augment}" if data.augment != "none" else None)
