"""The first training images of a run as the model sees them, small, for its report and for those that track it."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from launcher.engine import data
from launcher.engine.augmenting import picture
from launcher.engine.augmenting.mixing import choose_mix
from launcher.runs import thumbnails
from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from launcher.engine.data import Preprocessing
    from launcher.engine.loading.handover import Batch
    from launcher.engine.loading.samples import Samples
    from launcher.engine.schedule import Step
    from launcher.engine.setup import Parts
    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir

VERSION = 1
NUM_IMAGES = 12
"""An even number: mixup and CutMix mix pairs."""


class FirstBatch:
    """Keeps the first images that rank 0 trains on, and writes them down once the first step is taken.

    Images are loaded for it only where its first batch has too few, or training takes the features of a frozen
    backbone; and steps other than a run's first cost nothing.

    Args:
        parts: data and where the run's files are.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._seen: dict[int, torch.Tensor | None] = {}
        """Images by index; None: the step took features."""

    def of(self, step: Step, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of a run's first step; on rank 0 some images of the first one are kept.

        Args:
            step: what its samples are.
            batches: this rank's.
        """
        parts = self._parts
        if parts.ranks.rank or parts.run.sample_batch.exists():
            return batches
        return self._looking(step, batches)

    def _looking(self, step: Step, batches: Iterator[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            if not number:
                indices = step.micro_batches[0][:NUM_IMAGES]
                # A copy: loader processes take the memory again.
                images = [None] * len(indices) if self._parts.kept else batch[0][:NUM_IMAGES].clone()
                self._seen = dict(zip(indices, images, strict=True))
            yield batch

    def write(self) -> None:
        """Write ``sample_batch.json``, where there is something to write; what goes wrong costs nothing else."""
        seen, self._seen = self._seen, {}
        if not seen:
            return
        parts, found = self._parts, self._parts.train_set
        try:
            indices = list(seen)
            if len(indices) < NUM_IMAGES:
                left_out = {found.key(index) for index in parts.schedule.excluded}
                more = picture.first(found, parts.recipe, epoch=0, num=NUM_IMAGES, left_out=left_out)
                indices = list(dict.fromkeys([*indices, *more]))[:NUM_IMAGES]
            images = [found[0, index][0] if (image := seen.get(index)) is None else image for index in indices]
            _write(parts.run, parts.recipe, parts.preprocessing, found, indices, torch.stack(images))
        except Exception:  # a full disk, images of the user's own that are no pictures
            traceback.print_exc()


def write(run: RunDir, recipe: Recipe, preprocessing: Preprocessing, left_out: Collection[str]) -> None:
    """Write ``sample_batch.json`` after training: the first of the first epoch, augmented and mixed as in training.

    Args:
        run: where to.
        recipe: the run's, with the images where they are now.
        preprocessing: what was done to an image.
        left_out: paths of those that cannot be decoded.
    """
    images = data.open_split(recipe, "train", preprocessing, is_train=True)
    indices = picture.first(images, recipe, epoch=0, num=NUM_IMAGES, left_out=left_out)
    _write(run, recipe, preprocessing, images, indices, torch.stack([images[0, index][0] for index in indices]))


def _write(
    run: RunDir,
    recipe: Recipe,
    preprocessing: Preprocessing,
    images: Samples,
    indices: Sequence[int],
    loaded: torch.Tensor,
) -> None:
    """Write those of some indices of the first step, ``loaded`` (N x C x S x S) as a loader gives them."""
    mix = choose_mix(recipe.data, seed=recipe.seed, step=0, size=preprocessing.image_size)
    shown = picture.pixels(preprocessing, mix.images(preprocessing.normalize(loaded)))
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
