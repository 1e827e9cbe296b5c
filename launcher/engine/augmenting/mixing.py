"""Mixup and CutMix: images of a step are mixed in pairs, and so are their losses.

How is a function of (seed, step) alone, and who with whom of the places in the step: neighbours are a pair, and of an
odd number the first stays as it is. Schedules of a run that mixes keep pairs together, so the same global batch is
mixed in the same way at any number of ranks, batch sizes and accumulation. (A rank that can take but one image at a
time mixes none.)
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launcher.engine.schedule import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.recipe.schema_data import DataConfig

SALT = 0x6D6978
"""Apart from what else is seeded by (seed, step)."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the images of a step are mixed."""

    share: float = 1.0
    """How much of each image, and of its loss, stays its own; 1: nothing is mixed."""
    box: tuple[slice, slice] | None = None
    """CutMix: the rows and columns that each takes from its partner; None: mixup, the weighted mean of both."""

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Each image (N x C x S x S) with its part of the partner's."""
        if self.share == 1.0:
            return images
        partners = with_partners(images)
        if self.box is None:
            return images.mul(self.share).add_(partners, alpha=1.0 - self.share)
        rows, columns = self.box
        partners = partners[..., rows, columns]
        images = images.clone()
        images[..., rows, columns] = partners
        return images

    def mean(self, of: Callable[..., torch.Tensor], *labels: torch.Tensor) -> torch.Tensor:
        """What ``of`` gives for the labels (N), what else is known of each image, and for the partners' by their share.

        For a loss that is linear in its targets, as cross-entropy is, this is the loss of the soft label.
        """
        if self.share == 1.0:
            return of(*labels)
        return self.share * of(*labels) + (1.0 - self.share) * of(*map(with_partners, labels))


def with_partners(values: torch.Tensor) -> torch.Tensor:
    """What each one's partner has: neighbours are a pair; of an odd number the first is its own."""
    first, found = len(values) % 2, torch.empty_like(values)
    found[:first] = values[:first]
    found[first::2], found[first + 1 :: 2] = values[first + 1 :: 2], values[first::2]
    return found


def is_mixing(config: DataConfig) -> bool:
    """Whether a recipe mixes images."""
    return bool(config.mixup or config.cutmix)


def choose_mix(config: DataConfig, *, seed: int, step: int, size: int) -> Mix:
    """How the images of a step are mixed: by mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), else not at all.

    Where a recipe has both, each step takes one of them, each as often. It is chosen on the host: nobody waits for the
    device.

    Args:
        config: the recipe's.
        seed: the recipe's.
        step: optimizer steps before it.
        size: height and width of the images.
    """
    if not is_mixing(config):
        return Mix()
    chance = random.Random(derive_seed(seed, step, SALT))  # noqa: S311  no secret
    cuts = bool(config.cutmix) and (not config.mixup or chance.random() < 0.5)  # noqa: PLR2004  each as often
    if not cuts:
        share = chance.betavariate(config.mixup, config.mixup)
        return Mix(share=max(share, 1.0 - share))  # a pair is mixed both ways, so the two are the same images
    share = chance.betavariate(config.cutmix, config.cutmix)
    side = round(size * math.sqrt(1.0 - share))
    top, left = (chance.randrange(size - side + 1) for _ in range(2))
    return Mix(share=1.0 - side**2 / size**2, box=(slice(top, top + side), slice(left, left + side)))
