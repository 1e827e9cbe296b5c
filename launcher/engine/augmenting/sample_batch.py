"""The first training images of a run as the model sees them, small, for its report and for those that track it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image

from launcher.engine import data
from launcher.engine.augmenting import picture
from launcher.engine.augmenting.mixing import choose_mix
from launcher.engine.loading.samples import names_of
from launcher.runs import thumbnails
from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

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
    backbone; none of a data set of the user's own, for what it opened here would be shared with the loader processes
    forked later. Steps other than a run's first cost nothing.

    Args:
        parts: data and where the run's files are.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._seen: list[tuple[int, torch.Tensor | None]] = []
        """Indices with their images; None: the step took features."""

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
                indices = step.micro_batches[0]
                # Of an odd number the first is mixed with itself: so it is of those that are kept.
                num = NUM_IMAGES - 1 if len(indices) > NUM_IMAGES and len(indices) % 2 else NUM_IMAGES
                indices = indices[:num]
                # A copy: loader processes take the memory again.
                images = [None] * len(indices) if self._parts.kept else batch[0][:num].clone()
                self._seen = list(zip(indices, images, strict=True))
            yield batch

    def write(self, say: Callable[[str], None]) -> None:
        """Write ``sample_batch.json``, where there is something to write; what goes wrong costs nothing else.

        Args:
            say: is given a line where it cannot be written.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return
        parts, found = self._parts, self._parts.train_set
        is_own = parts.recipe.data.dataset is not None
        if is_own and parts.kept:
            return  # the exports draw them
        try:
            images = [(index, found[0, index][0] if image is None else image.cpu()) for index, image in seen]
            added = [] if is_own else self._more([index for index, _ in seen])
            groups = [images, [(index, found[0, index][0]) for index in added]]
            _write(parts.run, parts.recipe, parts.preprocessing, found, groups)
        except Exception as error:  # a full disk, images of the user's own that are no pictures
            say(f"the first training images cannot be shown: {type(error).__name__}: {error}; training goes on")

    def _more(self, seen: Sequence[int]) -> list[int]:
        """The indices of the first others, where too few are seen."""
        parts, found = self._parts, self._parts.train_set
        if len(seen) >= NUM_IMAGES - 1:
            return []
        left_out = {found.key(index) for index in parts.schedule.excluded}
        first = picture.first(found, parts.recipe, epoch=0, num=2 * NUM_IMAGES, left_out=left_out)
        return [index for index in dict.fromkeys(first) if index not in seen][: NUM_IMAGES - len(seen)]


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
    _write(run, recipe, preprocessing, images, [[(index, images[0, index][0]) for index in indices]])


def _write(
    run: RunDir,
    recipe: Recipe,
    preprocessing: Preprocessing,
    images: Samples,
    groups: Sequence[Sequence[tuple[int, torch.Tensor]]],
) -> None:
    """Write images of the first step (C x S x S, as a loader gives them) by index; each group is mixed by itself."""
    mix = choose_mix(recipe.data, seed=recipe.seed, step=0, size=preprocessing.image_size)
    rows = []
    for group in filter(None, groups):
        loaded = preprocessing.normalize(torch.stack([image for _, image in group]))
        rows += [
            {
                "image": images.key(index),
                "class": names_of(images.samples[index][1], images.classes),
                "picture": _picture(one),
            }
            for (index, _), one in zip(group, picture.pixels(preprocessing, mix.images(loaded)), strict=True)
        ]
    mixed = None if mix.share == 1.0 else "mixup" if mix.box is None else "CutMix"
    write_json_atomic(run.sample_batch, {"version": VERSION, "epoch": 0, "mixed": mixed, "images": rows})


def _picture(pixels: torch.Tensor) -> str | None:
    """Of uint8 C x S x S: colours, or grey where there is one channel."""
    rows = pixels.permute(1, 2, 0)
    return thumbnails.data_uri(Image.fromarray((rows[:, :, 0] if len(pixels) == 1 else rows).numpy()))
