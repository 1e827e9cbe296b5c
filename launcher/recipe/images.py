"""Where a recipe's images are, in the words of :mod:`launcher.images`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.images import datasets
from launcher.images.listing import Listing
from launcher.images.source import Source

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe


def source_of(recipe: Recipe) -> Source:
    """Where they are, or will be when :func:`launcher.images.datasets.prepare` has written them."""
    data = recipe.data
    return Source(
        path=str(datasets.data_path(data.name, data.path)),
        train=data.train,
        val=data.val,
        test=data.test,
        val_fraction=data.val_fraction,
        group=data.group,
        columns=data.columns,
        classes=data.classes,
        several=data.task == "multi_label",
        separator=data.separator,
        seed=recipe.seed,
        named=data.path,
    )


def listing_of(recipe: Recipe) -> Listing:
    """Its images, listed; what is written in the cache is written first where this machine lacks it, or it changed."""
    datasets.prepare(recipe.data.name, recipe.data.path)
    return Listing(source_of(recipe))
