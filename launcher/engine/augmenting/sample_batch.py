"""The first training images of a run as the model sees them, small, for its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from launcher.engine import data
from launcher.engine.augmenting import picture
from launcher.engine.augmenting.mixing import choose_mix
from launcher.runs import thumbnails
from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Collection

    from launcher.engine.data import Preprocessing
    from launcher.engine.loading.samples import Samples
    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir

VERSION = 1
NUM_IMAGES = 12
"""An even number: mixup and CutMix mix pairs."""


def write(run: RunDir, recipe: Recipe, preprocessing: Preprocessing, left_out: Collection[str]) -> None:
    """Write ``sample_batch.json``: the first of the first epoch, augmented and mixed as in training.

    Args:
        run: where to.
        recipe: the run's, with the images where they are now.
        preprocessing: what was done to an image.
        left_out: paths of those that cannot be decoded.
    """
    images = data.open_split(recipe, "train", preprocessing, is_train=True)
    indices = picture.first(images, recipe, epoch=0, num=NUM_IMAGES, left_out=left_out)
    seen = preprocessing.normalize(torch.stack([images[0, index][0] for index in indices]))
    mix = choose_mix(recipe.data, seed=recipe.seed, step=0, size=preprocessing.image_size)
    shown = picture.pixels(preprocessing, mix.images(seen))
    rows = [
        {
            "image": images.key(index),
            "class": _classes(images, index),
            "picture": _picture(one),
        }
        for index, one in zip(indices, shown, strict=True)
    ]
    mixed = None if mix.share == 1.0 else "mixup" if mix.box is None else "CutMix"
    write_json_atomic(run.sample_batch, {"version": VERSION, "epoch": 0, "mixed": mixed, "images": rows})


def _picture(pixels: torch.Tensor) -> str | None:
    """Of uint8 C x S x S: colours, or grey where there is one channel."""
    rows = pixels.permute(1, 2, 0)
    return thumbnails.data_uri(Image.fromarray((rows[:, :, 0] if len(pixels) == 1 else rows).numpy()))


def _classes(images: Samples, index: int) -> Any:
    """The name of a sample's class; of several a list."""
    label = images.samples[index][1]
    return images.classes[label] if isinstance(label, int) else [images.classes[one] for one in label]
