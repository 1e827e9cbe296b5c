"""The first training images of a run as the model sees them, small, for its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torchvision.transforms.v2.functional import to_pil_image

from launcher.engine import data
from launcher.engine.augmenting import picture
from launcher.engine.augmenting.mixing import choose_mix
from launcher.engine.schedule import epoch_order
from launcher.report import thumbnails
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
    order = epoch_order(recipe.seed, 0, len(images)).tolist()
    indices = [index for index in order[: NUM_IMAGES + len(left_out)] if images.key(index) not in left_out]
    indices = indices[:NUM_IMAGES]
    seen = preprocessing.normalize(torch.stack([images[0, index][0] for index in indices]))
    mix = choose_mix(recipe.data, seed=recipe.seed, step=0, size=preprocessing.image_size)
    shown = picture.pixels(preprocessing, mix.images(seen))
    rows = [
        {
            "image": images.key(index),
            "class": _classes(images, index),
            "picture": thumbnails.data_uri(to_pil_image(one)),
        }
        for index, one in zip(indices, shown, strict=True)
    ]
    mixed = None if mix.share == 1.0 else "mixup" if mix.box is None else "CutMix"
    write_json_atomic(run.sample_batch, {"version": VERSION, "epoch": 0, "mixed": mixed, "images": rows})


def _classes(images: Samples, index: int) -> Any:
    """The name of a sample's class; of several a list."""
    label = images.samples[index][1]
    return images.classes[label] if isinstance(label, int) else [images.classes[one] for one in label]
