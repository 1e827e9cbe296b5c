"""When features are kept: follows from the recipe alone, so that a resumed run does as an undisturbed one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.engine.augmenting import transforms as augmentation
from launcher.engine.augmenting.mixing import is_mixing
from launcher.recipe import phases

if TYPE_CHECKING:
    from launcher.engine.model import FineTunedModel
    from launcher.recipe.schema import Recipe


def frozen_epochs(recipe: Recipe, model: FineTunedModel) -> int:
    """How many epochs from the first on have the same layers frozen; 0: none is."""
    first = model.frozen_parameters(0)
    if not first:
        return 0
    later = [phase.start for phase in phases.phases(recipe)[1:]]
    return next((epoch for epoch in later if model.frozen_parameters(epoch) != first), recipe.train.epochs)


def num_views(recipe: Recipe) -> int:
    """How many views of a training image are kept; 0: none, as where images are mixed with each other."""
    if is_mixing(recipe.data):
        return 0
    if recipe.train.feature_views == "auto":
        return 0 if why_random(recipe) else 1
    return recipe.train.feature_views


def why_random(recipe: Recipe) -> str | None:
    """What may make a training image look different in every epoch; None: it looks the same."""
    data = recipe.data
    if data.transform or data.dataset:
        return "data.transform" if data.transform else "data.dataset"
    if augmentation.crop_scale(data) is None and not augmentation.build_steps(data, (0.0, 0.0, 0.0)):
        return None
    return "the augmentation" if data.augment == "none" else f"data.augment={data.augment}"
