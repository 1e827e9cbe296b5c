"""From a file to uint8 RGB: what training, validation and the exports' measurement read images with."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from launcher.engine.loading.crops import Box, Picture, Pixels
from launcher.errors import TrainingError
from launcher.images import members, pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.JpegImagePlugin import JpegImageFile

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
ORIENTATION = 0x0112
SIDEWAYS = range(5, 9)
"""EXIF orientations whose height and width change places."""
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What makes an image upright, by its EXIF orientation, as Pillow calls it."""
SMALL_FILE = 1 << 16
"""Bytes of a JPEG file that is always decoded whole: it has too few pixels for that to be slower."""
SHRINKS = (8, 4, 2)
"""Decoding this many times smaller, libjpeg skips work: 12 megapixels at half the size take 0.4 of the time."""


def read_image(
    path: str, *, background: Sequence[int] = pixels.WHITE, grey_range: Sequence[float] | None = None
) -> torch.Tensor:
    """Decode a file to uint8 RGB, 3 x H x W, as :func:`launcher.images.pixels.to_rgb` makes it.

    JPEG by torchvision, twice as fast as Pillow; the rest by Pillow: torchvision 0.29 takes the whole process down on
    some damaged PNG files, and leaves EXIF and 16 bits in other formats alone. The content decides, not the name.

    Args:
        path: the file, or the member of an archive.
        background: red, green and blue of what transparency shows.
        grey_range: the values that are black and white in grey of more than 8 bits; None: as the kind of number says.

    Raises:
        TrainingError: the file cannot be decoded; names it.
    """
    try:
        encoded = _read(path)
        if _is_jpeg(encoded):  # it has no transparency, and 8 bits
            return _decode_jpeg(encoded)
        return _decode_with_pillow(encoded, background, grey_range)
    except Exception as error:  # whatever a foreign file's bytes make the decoders raise
        raise _cannot_be_decoded(path, error) from error


def open_image(
    path: str, *, background: Sequence[int] = pixels.WHITE, grey_range: Sequence[float] | None = None
) -> Picture:
    """The same, but a large JPEG file is decoded when it is known which part is wanted, and no larger than that needs.

    Args:
        path: the file.
        background: as of :func:`read_image`.
        grey_range: likewise.

    Raises:
        TrainingError: the file cannot be decoded; names it.
    """
    try:
        encoded = _read(path)
        if not _is_jpeg(encoded):
            return Pixels(_decode_with_pillow(encoded, background, grey_range))
        return (len(encoded) >= SMALL_FILE and _open_jpeg(path, encoded)) or Pixels(_decode_jpeg(encoded))
    except Exception as error:  # whatever a foreign file's bytes make the decoders raise
        raise _cannot_be_decoded(path, error) from error


class JpegFile(Picture):
    """A JPEG file whose header was read.

    Args:
        path: for messages.
        encoded: its bytes.
        header: the same, opened by Pillow.
        orientation: of its EXIF data; 1: upright.
    """

    def __init__(self, path: str, encoded: torch.Tensor, header: JpegImageFile, orientation: int) -> None:
        width, height = header.size
        super().__init__(*((width, height) if orientation in SIDEWAYS else (height, width)))
        self._path = path
        self._encoded = encoded
        self._header = header
        self._orientation = orientation

    def part(self, box: Box, least: int) -> torch.Tensor:
        """Decoded 2, 4 or 8 times smaller where that leaves enough pixels, by Pillow; else whole, by torchvision."""
        room = min(box.height, box.width) // least
        shrink = next((times for times in SHRINKS if times <= room), 1)
        if shrink > 1:
            with contextlib.suppress(Exception):  # what Pillow does not like may be good enough for torchvision
                return self._cut(self._decode_smaller(shrink), box)
        try:
            return self._cut(_decode_jpeg(self._encoded), box)
        except Exception as error:  # whatever a foreign file's bytes make the decoder raise
            raise _cannot_be_decoded(self._path, error) from error

    def _decode_smaller(self, times: int) -> torch.Tensor:
        from PIL import Image

        self._header.draft(None, (max(1, self._header.width // times), max(1, self._header.height // times)))
        image = self._header if self._header.mode == "RGB" else self._header.convert("RGB")
        if self._orientation in TURNS:
            image = image.transpose(Image.Transpose[TURNS[self._orientation]])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _open_jpeg(path: str, encoded: torch.Tensor) -> JpegFile | None:
    """None: a file with something that Pillow and torchvision may see differently."""
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile

    content = encoded.numpy().tobytes()
    try:
        header = JpegImageFile(io.BytesIO(content))  # Image.open would take some for several images in one
        assert header.fp  # noqa: S101  it is open
        if header.mode not in ("RGB", "L") or content.rfind(JPEG_END, header.fp.tell()) < 0:  # else it is truncated
            return None
        exif = Image.Exif()
        exif.load(header.info.get("exif", b""))  # not header.getexif: torchvision does not look into XMP either
        orientation = exif.get(ORIENTATION, 1)
    except Exception:  # whatever a foreign file's bytes make Pillow raise
        return None
    return JpegFile(path, encoded, header, orientation if orientation in range(1, 9) else 1)


def _read(path: str) -> torch.Tensor:
    """The bytes of a file, or of a member of an archive."""
    if members.find(path):
        return torch.frombuffer(bytearray(members.read(path)), dtype=torch.uint8)
    return read_file(path)


def _is_jpeg(encoded: torch.Tensor) -> bool:
    return encoded[:2].tolist() == list(JPEG_START)


def _decode_jpeg(encoded: torch.Tensor) -> torch.Tensor:
    return decode_image(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def _decode_with_pillow(
    encoded: torch.Tensor, background: Sequence[int], grey_range: Sequence[float] | None
) -> torch.Tensor:
    from PIL import Image

    with Image.open(io.BytesIO(encoded.numpy().tobytes())) as image:
        return v2.functional.pil_to_tensor(pixels.to_rgb(image, background, grey_range))


def _cannot_be_decoded(path: str, error: Exception) -> TrainingError:
    return TrainingError(f"{path}: cannot be decoded as an image: {error}; repair or remove the file")
