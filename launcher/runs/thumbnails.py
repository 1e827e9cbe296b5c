"""Small pictures of single images, for the report and for those that track the run: few, and bounded in bytes."""

from __future__ import annotations

import base64
import contextlib
import io
from typing import TYPE_CHECKING, Any

from launcher.images import datasets, members, pixels
from launcher.images.source import Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image as PillowImage

    from launcher.recipe.schema_data import DataConfig

SIDE = 112
"""Pixels of the longer side."""
QUALITY = 70
"""Of the JPEG."""
MOST_BYTES = 16 << 10
"""Of one picture: a photo of this size has 3 to 6 KB. A larger one is left out."""
MOST_FILE_BYTES = 64 << 20
"""Of an image file: a larger one is not opened."""

Json = dict[str, Any]


def with_pictures(rows: Sequence[Json], data: DataConfig) -> list[Json]:
    """Each row with its ``picture``, a data URI; None where its image is not there any more, or no picture is made."""
    return [row | {"picture": _as_uri(small)} for row, small in zip(rows, jpegs(rows, data), strict=True)]


def jpegs(rows: Sequence[Json], data: DataConfig) -> list[bytes | None]:
    """Each row's image as the model is given it, small; None where it cannot be read, or has too many bytes."""
    with contextlib.suppress(Exception):  # whatever is wrong: who asks goes without
        root = Source(path=str(datasets.data_path(data.name, data.path))).root
        return [_jpeg(str(root / row["image"]), data) for row in rows]
    return [None] * len(rows)


def _jpeg(path: str, data: DataConfig) -> bytes | None:
    from PIL import Image

    with contextlib.suppress(Exception):
        if members.stamp(path)[0] > MOST_FILE_BYTES:
            return None
        with Image.open(members.stream(path)) as opened:
            opened.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at an eighth of its size where that does
            return _small(pixels.to_rgb(opened, data.background_rgb, data.grey_limits))
    return None


def data_uri(image: PillowImage) -> str | None:
    """A small picture of an image (which is made small) for a page; None where it has too many bytes."""
    return _as_uri(_small(image))


def _small(image: PillowImage) -> bytes | None:
    image.thumbnail((SIDE, SIDE))
    made = io.BytesIO()
    image.save(made, "JPEG", quality=QUALITY, optimize=True)
    return made.getvalue() if made.tell() <= MOST_BYTES else None


def _as_uri(picture: bytes | None) -> str | None:
    return None if picture is None else f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
