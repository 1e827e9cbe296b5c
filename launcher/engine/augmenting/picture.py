"""A picture of training images as the model sees them, beside what they are without augmentation."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torchvision.io import encode_png
from torchvision.utils import make_grid

from launcher.engine import data
from launcher.engine.augmenting.mixing import choose_mix
from launcher.engine.loading.balance import balanced_order
from launcher.engine.loading.data_sets import open_images
from launcher.engine.schedule import epoch_order

if TYPE_CHECKING:
    from collections.abc import Collection

    from launcher.engine.data import Preprocessing
    from launcher.engine.loading.samples import Samples
    from launcher.recipe.schema import Recipe

NUM_IMAGES, A_ROW = 16, 4
GAP, BETWEEN = 2, 12
"""Pixels between two images, and between before and after."""


def draw(recipe: Recipe, *, epoch: int) -> bytes:
    """A PNG of an epoch's first sixteen training images.

    On the left as validation would see them, on the right as the model sees them, with mixup or CutMix as one step
    mixes them.

    Args:
        recipe: checked.
        epoch: from 0; each has its own order and randomness.
    """
    images = open_images(recipe)
    plain = data.open_split(recipe, "train", images.preprocessing)
    indices = first(images.train, recipe, epoch=epoch, num=NUM_IMAGES)
    before, after = (torch.stack([of[epoch, index][0] for index in indices]) for of in (plain, images.train))
    seen = images.preprocessing.normalize(after)
    size = images.preprocessing.image_size
    mixed = choose_mix(recipe.data, seed=recipe.seed, step=epoch, size=size).images(seen)
    grids = [_grid(images.preprocessing, found) for found in (images.preprocessing.normalize(before), mixed)]
    space = torch.full((3, grids[0].shape[1], BETWEEN), 255, dtype=torch.uint8)
    png: bytes = encode_png(torch.cat([grids[0], space, grids[1]], dim=2)).numpy().tobytes()
    return png


def first(images: Samples, recipe: Recipe, *, epoch: int, num: int, left_out: Collection[str] = ()) -> list[int]:
    """The indices of the first images that an epoch trains on, without those of the keys ``left_out``."""
    if recipe.data.balance == "sampler":
        order, _ = balanced_order(recipe.seed, epoch, [label for _, label in images.samples])
    else:
        order = epoch_order(recipe.seed, epoch, len(images))
    used = (index for index in order.tolist() if images.key(index) not in left_out)
    return list(itertools.islice(used, num))


def _grid(preprocessing: Preprocessing, images: torch.Tensor) -> torch.Tensor:
    """What the model sees, in rows: uint8 3 x H x W."""
    return make_grid(pixels(preprocessing, images), nrow=A_ROW, padding=GAP, pad_value=255)


def pixels(preprocessing: Preprocessing, images: torch.Tensor) -> torch.Tensor:
    """What the model sees, turned back into pixels: uint8 N x C x S x S."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (images * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
