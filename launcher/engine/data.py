"""From image files to batches: decoding, transforms, loaders. Randomness is a function of the sample, not of state."""

from __future__ import annotations

import functools
import math
import os
import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from launcher.engine.augmenting import transforms as augmentation
from launcher.engine.device import num_cores
from launcher.engine.loading.crops import CentreCrop, Picture, RandomCrop
from launcher.engine.loading.decode import open_image, read_image
from launcher.engine.loading.handover import Batch, Loader
from launcher.engine.loading.image_files import ImageDataset
from launcher.engine.loading.kept_pixels import Keeping
from launcher.engine.user.dataset import UserDataset
from launcher.engine.user.transform import UserTransform
from launcher.images import pixels
from launcher.recipe.images import listing_of
from launcher.system.numa import Place
from launcher.system.processes import STOP_SIGNALS, die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from launcher.engine.device import Device
    from launcher.engine.distributed import Ranks
    from launcher.engine.loading.samples import Samples
    from launcher.recipe.schema import Recipe
    from launcher.recipe.schema_data import DataConfig

PREFETCH = 4
"""Batches that each loader process makes ahead."""
MANY_WORKERS, MANY_PREFETCH = 8, 2
"""Of more processes than this each makes fewer ahead."""
BYTES_OF_LABEL, BYTES_OF_FLOAT = 8, 4


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to an image before the model sees it; exports carry it with them."""

    image_size: int
    """Height and width in pixels of what the model sees."""
    resize_size: int
    """Pixels of the short side before the centre crop."""
    mean: tuple[float, ...]
    """Of each channel, as fractions; subtracted."""
    std: tuple[float, ...]
    """Of each channel, as fractions; divided by."""
    interpolation: str
    """bilinear or bicubic, antialiased."""
    background: tuple[int, int, int] = pixels.WHITE
    """Red, green and blue of what transparency shows."""
    grey_range: tuple[float, float] | None = None
    """What is black and white in grey of more than 8 bits; None: as the kind of number says."""
    channels: int = 3
    """3, or 1: what is cut out is made grey."""
    own_transform: str | None = None
    """The user's own transform, which does all of it instead."""
    decode: str = "fast"
    """How training reads images for random crops, as ``data.decode`` says: fast or exact. All others are exact."""

    @property
    def bytes_of_sample(self) -> int:
        """What an image and its label take in a batch that loaders hand over."""
        of_pixel = BYTES_OF_FLOAT if self.own_transform else 1
        return self.channels * self.image_size**2 * of_pixel + BYTES_OF_LABEL

    def read(self, path: str) -> torch.Tensor:
        """Decode a file to uint8 RGB, 3 x H x W.

        Raises:
            TrainingError: it cannot be decoded; names it.
        """
        return read_image(path, background=self.background, grey_range=self.grey_range)

    def open(self, path: str) -> Picture:
        """A file for a random crop: of a large JPEG no more is decoded than the crop needs.

        Raises:
            TrainingError: it cannot be decoded; names it.
        """
        return open_image(path, background=self.background, grey_range=self.grey_range)

    def transform(self, augment: str | DataConfig = "none") -> Callable[[Any], torch.Tensor]:
        """The centre crop, or the augmentation of a recipe's ``data``.

        From what :meth:`read` gives, and with a random crop also from what :meth:`open` gives, to uint8 C x S x S.

        Args:
            augment: a preset, as ``data.augment`` names it, or all of the recipe's ``data``.
        """
        from launcher.recipe.schema_data import DataConfig

        config = DataConfig(augment=augment) if isinstance(augment, str) else augment  # type: ignore[arg-type]
        scale = augmentation.crop_scale(config)
        if scale is None:
            size = {"resize_size": self.resize_size, "image_size": self.image_size}
            crop: Any = CentreCrop(**size, interpolation=self.interpolation)
        else:
            crop = RandomCrop(image_size=self.image_size, scale=scale, interpolation=self.interpolation)
        steps = augmentation.build_steps(config, self.mean)
        if self.channels == 1:
            steps.append(augmentation.to_grey)
        return v2.Compose([crop, *steps]) if steps else crop

    def keeping(self, config: DataConfig | None = None) -> Keeping:
        """What ``data.cache`` keeps of an image: a picture in which the smallest crop is not blurred, or the centre.

        Args:
            config: by which training images are augmented; None: images are seen as in validation.
        """
        scale = augmentation.crop_scale(config) if config else None
        return Keeping(
            short_side=None if scale is None else math.ceil(self.image_size / math.sqrt(scale[0])),
            image_size=self.image_size,
            resize_size=self.resize_size,
            interpolation=self.interpolation,
            background=self.background,
            grey_range=self.grey_range,
            fast=scale is not None and self.decode == "fast",
        )

    def describe(self) -> dict[str, Any]:
        """All of it as values, and in words, for programs and people that use an export."""
        facts = {
            "image_size": self.image_size,
            "resize_size": self.resize_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "antialias": True,
            "orientation": "exif",
            "train_decode": "exact" if self.own_transform else self.decode,
            "background": list(self.background),
            "grey_range": self.grey_range and list(self.grey_range),
            "channels": self.channels,
        }
        if self.own_transform:
            words = (
                f"by the user's own code, {self.own_transform}, to float32 3 x {self.image_size} x {self.image_size}"
            )
            return facts | {"transform": self.own_transform, "description": words}
        return facts | {"description": pixels.describe(facts)}

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 N x C x S x S to float32, on the images' own device; the user's own transform has done it already."""
        if images.is_floating_point():
            return images
        mean, std = _per_channel(self.mean, images.device), _per_channel(self.std, images.device)
        return images.float().div_(255).sub_(mean).div_(std)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """1 x C x 1 x 1, made once: copying to a GPU waits for all that it still has to do."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


class BothSplits(Dataset[Batch]):
    """What is looked at between the steps: positions are (whether it is a training image, epoch, index)."""

    def __init__(self, train: Samples, val: Samples) -> None:
        self._of = {True: train, False: val}

    def __getitem__(self, position: tuple[bool, int, int]) -> Batch:
        """The sample, as its split gives it."""
        is_train, epoch, index = position
        return self._of[is_train][epoch, index]


def open_split(
    recipe: Recipe,
    split: str,
    preprocessing: Preprocessing,
    *,
    is_train: bool = False,
    left_out: frozenset[str] = frozenset(),
    classes: list[str] | None = None,
) -> Samples:
    """The samples of one split of a recipe's data set, as training or validation sees them.

    Args:
        recipe: the run's.
        split: train or val.
        preprocessing: what is done to an image.
        is_train: seen as in training, augmented.
        left_out: keys that are no samples; of training images the schedule leaves them out.
        classes: names in the order of the logits; None: those of the data set.
    """
    config = recipe.data
    transform: Callable[[Any], torch.Tensor] = preprocessing.transform(config if is_train else "none")
    if config.transform:
        facts = {"mean": preprocessing.mean, "std": preprocessing.std, "interpolation": preprocessing.interpolation}
        transform = UserTransform(
            config,
            train=is_train,
            image_size=preprocessing.image_size,
            from_file=not config.dataset,
            facts=facts,
        )
    if config.dataset:
        return UserDataset(config, split, transform, seed=recipe.seed, left_out=left_out, classes=classes)
    crops = is_train and augmentation.crop_scale(config) is not None and not config.transform
    read = preprocessing.open if crops and config.decode == "fast" else preprocessing.read
    options: dict[str, Any] = {"seed": recipe.seed, "left_out": left_out, "classes": classes}
    dataset = ImageDataset(listing_of(recipe), split, transform, read=read, **options)
    if config.cache != "none":
        dataset.use_kept(split, preprocessing.keeping(config if is_train else None))
    return dataset


def find_classes(recipe: Recipe) -> list[str]:
    """Names of the classes of a recipe's data set, in the order of the logits."""
    if recipe.data.dataset:
        return UserDataset(recipe.data, "train", lambda image: image, seed=recipe.seed).classes
    return listing_of(recipe).classes


def build_loader(
    dataset: Dataset[Batch],
    batches: Iterable[Sequence[Any]],
    *,
    workers: int,
    device: Device,
    prefetch: int = PREFETCH,
    lives_on: bool = False,
) -> Loader:
    """A loader of exactly these ``batches`` of (epoch, index), in this order; an empty one gives an empty batch.

    With ``lives_on`` its processes stay for other batches.
    """
    return Loader(
        dataset,
        batches,
        workers=workers,
        prefetch=prefetch,
        lives_on=lives_on,
        collate_fn=_collate,
        pin_memory=device.pin_memory,
        worker_init_fn=_start_loader_worker if workers else None,
    )


def num_loader_workers(config: DataConfig, ranks: Ranks) -> int:
    """``data.workers``; auto: the rank's cores but the one that trains, where nothing was measured."""
    return num_rank_cores(ranks) - 1 if config.workers == "auto" else config.workers


def num_ahead(workers: int) -> int:
    """Batches that each of so many loader processes makes ahead: many processes have as many batches with fewer."""
    return PREFETCH if workers <= MANY_WORKERS else MANY_PREFETCH


def num_rank_cores(ranks: Ranks) -> int:
    """Cores of each of the node's workers: its share of those near its GPU, or of all."""
    place = Place.told(ranks.local_rank)
    return place.num_cores if place else max(1, num_cores() // ranks.local_world_size)


def _collate(samples: list[Batch]) -> Batch:
    """Stack samples to a batch; an empty list becomes a batch of no images."""
    if not samples:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)


def _start_loader_worker(_: int) -> None:
    torch.set_num_threads(1)
    # A signal to the whole process group (Ctrl-C, scancel) must not take the loaders from under a rank that is about
    # to save; they end when the rank does, however it ends.
    signal.set_wakeup_fd(-1)  # the rank's
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # But the rank itself ends them with SIGTERM when it fails, and waits for ever for one that does not obey.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=(os.getppid(),), name="obey-parent", daemon=True).start()
    die_with_parent()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
