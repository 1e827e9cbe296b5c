"""What is cut out of a picture: the same box of it, however many of its pixels were decoded or kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

from launcher.images import pixels

NARROW = 8
"""How many times longer than wide an image is of which only the centre is resized; all of it would cost gigabytes."""


class Box(NamedTuple):
    """Part of a picture, in pixels of the whole one."""

    top: int
    left: int
    height: int
    width: int


class Picture(ABC):
    """An image of which only what is asked for need be computed.

    Args:
        height: of the whole image as its file has it, upright.
        width: likewise.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        self.width = width

    @abstractmethod
    def part(self, box: Box, least: int) -> torch.Tensor:
        """The pixels in a box, uint8 3 x H x W; they may be fewer, but where there are so many, at least ``least``.

        Args:
            box: which part.
            least: pixels of height and of width that the result is used at.
        """

    def _cut(self, found: torch.Tensor, box: Box) -> torch.Tensor:
        """The box out of the whole picture, ``found``, which may be smaller: the nearest whole pixels."""
        rows = _scaled(box.top, box.height, found.shape[-2], self.height)
        return found[..., rows, _scaled(box.left, box.width, found.shape[-1], self.width)]


def _scaled(start: int, length: int, num: int, whole: int) -> slice:
    """A stretch of ``whole`` pixels, of which there are only ``num``; at least one of them."""
    first = min(round(start * num / whole), num - 1)
    return slice(first, max(first + 1, round((start + length) * num / whole)))


class Pixels(Picture):
    """A picture that is decoded already, whole or smaller.

    Args:
        found: uint8 3 x H x W.
        size: height and width of the whole; None: this is it.
    """

    def __init__(self, found: torch.Tensor, size: tuple[int, int] | None = None) -> None:
        super().__init__(*(size or (found.shape[-2], found.shape[-1])))
        self._found = found

    def part(self, box: Box, least: int) -> torch.Tensor:  # noqa: ARG002  there are not more
        """The pixels in the box that there are."""
        return self._cut(self._found, box)


class View(NamedTuple):
    """What :class:`CentreCrop` gave of an image, kept."""

    pixels: torch.Tensor
    """uint8 3 x S x S."""


class RandomCrop:
    """A random part, resized; which part is drawn as torchvision's RandomResizedCrop draws it, and from what it draws.

    Args:
        image_size: height and width of the result.
        scale: the least and the largest fraction of the picture's area.
        interpolation: bilinear or bicubic, antialiased.
    """

    def __init__(self, *, image_size: int, scale: tuple[float, float], interpolation: str) -> None:
        self._size = image_size
        self._mode = InterpolationMode(interpolation)
        self._draws = v2.RandomResizedCrop(image_size, scale=scale)

    def __call__(self, image: torch.Tensor | Picture) -> torch.Tensor:
        """From a picture, or uint8 3 x H x W, to uint8 3 x S x S."""
        picture = image if isinstance(image, Picture) else Pixels(image)
        shape = torch.empty(()).expand(3, picture.height, picture.width)  # of no memory
        box = Box(**self._draws.make_params([shape]))
        part = picture.part(box, self._size)
        return v2.functional.resize(part, [self._size, self._size], interpolation=self._mode, antialias=True)


class CentreCrop:
    """The short side resized, and the centre cut out: uint8 3 x H x W to uint8 3 x S x S.

    Args:
        resize_size: pixels of the short side.
        image_size: height and width of what is cut out.
        interpolation: bilinear or bicubic, antialiased.
    """

    def __init__(self, *, resize_size: int, image_size: int, interpolation: str) -> None:
        self._arguments = resize_size, image_size, interpolation
        resize = v2.Resize(resize_size, interpolation=InterpolationMode(interpolation), antialias=True)
        self._whole = v2.Compose([resize, v2.CenterCrop(image_size)])

    def __call__(self, image: torch.Tensor | View) -> torch.Tensor:
        """Resize and crop; the same pixels, up to rounding, whatever the shape."""
        if isinstance(image, View):
            return image.pixels
        height, width = image.shape[-2:]
        if max(height, width) <= NARROW * min(height, width):
            cropped: torch.Tensor = self._whole(image)
            return cropped
        from PIL import Image

        whole = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        return v2.functional.pil_to_tensor(pixels.centre_crop(whole, *self._arguments))
