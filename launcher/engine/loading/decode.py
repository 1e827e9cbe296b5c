"""From a file to uint8 RGB: what training, validation and the exports' measurement read images with."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import InterpolationMode, v2

from launcher.errors import TrainingError
from launcher.images import pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

JPEG_START = [0xFF, 0xD8]
NARROW = 8
"""How many times longer than wide an image is of which only the centre is resized; all of it would cost gigabytes."""


def read_image(
    path: str, *, background: Sequence[int] = pixels.WHITE, grey_range: Sequence[float] | None = None
) -> torch.Tensor:
    """Decode a file to uint8 RGB, 3 x H x W, as :func:`launcher.images.pixels.to_rgb` makes it.

    JPEG by torchvision, twice as fast as Pillow; the rest by Pillow: torchvision 0.29 takes the whole process down on
    some damaged PNG files, and leaves EXIF and 16 bits in other formats alone. The content decides, not the name.

    Args:
        path: the file.
        background: red, green and blue of what transparency shows.
        grey_range: the values that are black and white in grey of more than 8 bits; None: as the kind of number says.

    Raises:
        TrainingError: the file cannot be decoded; names it.
    """
    try:
        encoded = read_file(path)
        if encoded[:2].tolist() == JPEG_START:  # it has no transparency, and 8 bits
            return decode_image(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        return _decode_with_pillow(encoded, background, grey_range)
    except Exception as error:  # whatever a foreign file's bytes make the decoders raise
        raise TrainingError(f"{path}: cannot be decoded as an image: {error}; repair or remove the file") from error


def _decode_with_pillow(
    encoded: torch.Tensor, background: Sequence[int], grey_range: Sequence[float] | None
) -> torch.Tensor:
    from PIL import Image

    with Image.open(io.BytesIO(encoded.numpy().tobytes())) as image:
        return v2.functional.pil_to_tensor(pixels.to_rgb(image, background, grey_range))


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

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Resize and crop; the same pixels, up to rounding, whatever the shape."""
        height, width = image.shape[-2:]
        if max(height, width) <= NARROW * min(height, width):
            cropped: torch.Tensor = self._whole(image)
            return cropped
        from PIL import Image

        whole = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        return v2.functional.pil_to_tensor(pixels.centre_crop(whole, *self._arguments))
