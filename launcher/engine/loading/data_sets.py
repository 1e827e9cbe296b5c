"""The images of a run, listed: those to learn from and those to measure with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.engine import data
from launcher.engine.model import build_preprocessing
from launcher.images import folder as image_folder
from launcher.recipe import load as recipes

if TYPE_CHECKING:
    from launcher.engine.data import Preprocessing
    from launcher.engine.loading.samples import Samples
    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class DataSets:
    """The images of a run, listed."""

    train: Samples
    """To learn from."""
    val: Samples
    """To measure with."""
    preprocessing: Preprocessing
    """What is done to an image."""
    left_out: frozenset[str]
    """Paths of those that cannot be decoded."""


def open_data_sets(run: RunDir) -> DataSets:
    """List the images that the recipe of ``run`` names; touches no device."""
    recipe = recipes.read_resolved(run.recipe)
    left_out = image_folder.read_quarantine(run.bad_images)
    return open_images(recipe, left_out)


def open_images(recipe: Recipe, left_out: frozenset[str] = frozenset()) -> DataSets:
    """The same, of a recipe; without those that are ``left_out``."""
    classes = num_classes(recipe, data.find_classes(recipe)) if recipe.model.factory else None
    preprocessing = build_preprocessing(recipe.model, recipe.data, num_classes=classes)
    train = data.open_split(recipe, "train", preprocessing, is_train=True)
    val = data.open_split(recipe, "val", preprocessing, left_out=left_out, classes=train.classes)
    return DataSets(train=train, val=val, preprocessing=preprocessing, left_out=left_out)


def num_classes(recipe: Recipe, classes: list[str]) -> int:
    """Outputs of the head: the recipe's number, or one for each class folder."""
    return len(classes) if recipe.model.num_classes == "auto" else recipe.model.num_classes


def full_classes(recipe: Recipe, classes: list[str]) -> list[str]:
    """Names of the outputs in their order; a head wider than the data set has some without a name."""
    return classes + [f"unused-{i}" for i in range(len(classes), num_classes(recipe, classes))]
