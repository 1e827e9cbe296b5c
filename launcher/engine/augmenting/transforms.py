"""What happens to a training image besides resizing, by torchvision's transforms; uint8 3 x S x S stays that.

Their randomness is that of torch's generator, which follows from (seed, epoch, sample).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torchvision.transforms import InterpolationMode, v2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.recipe.schema_data import DataConfig

COLOURS = 3
PRESETS: dict[str, tuple[tuple[float, float] | None, float]] = {
    "none": (None, 0.0),
    "light": ((0.64, 1.0), 0.0),
    "standard": ((0.25, 1.0), 0.5),
}
"""By ``data.augment``: which fractions of the area a random crop has (None: the centre crop), and how often it is
mirrored."""


def crop_scale(config: DataConfig) -> tuple[float, float] | None:
    """Fractions of the area that a random crop takes, at least and at most; None: the centre crop of validation."""
    if config.crop_scale == "auto":
        return PRESETS[config.augment][0]
    return config.crop_scale[0], config.crop_scale[1]


def build_steps(config: DataConfig, mean: Sequence[float]) -> list[Callable[..., Any]]:
    """What comes after the crop, in its order.

    Args:
        config: the recipe's.
        mean: of each channel, from 0 to 1: what is turned in from outside or erased has this colour.
    """
    fill = [round(255 * value) for value in mean] * (1 if len(mean) > 1 else COLOURS)
    flip = PRESETS[config.augment][1] if config.flip == "auto" else config.flip
    found: list[Callable[..., Any]] = []
    if flip:
        found.append(v2.RandomHorizontalFlip(flip))
    if config.rotate:
        limits = [-config.rotate, config.rotate]
        found.append(v2.RandomRotation(limits, interpolation=InterpolationMode.BILINEAR, fill=fill))
    if config.auto_augment != "none":
        found.append(_automatic(config, fill))
    if config.color_jitter:
        found.append(v2.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter))
    if config.erase:
        found.append(v2.RandomErasing(config.erase, value=fill))  # type: ignore[arg-type]  # which takes a list too
    return found


def to_grey(image: torch.Tensor) -> torch.Tensor:
    """uint8 3 x H x W to grey, 1 x H x W: the very values of Pillow's convert("L"), which exports are used with."""
    red, green, blue = image.to(torch.int32)
    grey: torch.Tensor = (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16
    return grey.to(torch.uint8)[None]


def _automatic(config: DataConfig, fill: list[int]) -> Callable[..., Any]:
    options: dict[str, Any] = {"interpolation": InterpolationMode.BILINEAR, "fill": fill}
    if config.auto_augment == "randaugment":
        return v2.RandAugment(magnitude=config.magnitude, **options)
    return v2.TrivialAugmentWide(**options) if config.auto_augment == "trivialaugment" else v2.AugMix(**options)
