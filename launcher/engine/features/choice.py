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
        return int(is_deterministic(recipe))
    return recipe.train.feature_views


def is_deterministic(recipe: Recipe) -> bool:
    """Whether a training image looks the same in every epoch, as far as is known without looking into users' code."""
    return recipe.data.augment == "none" and not recipe.data.transform and not recipe.data.dataset
