"""Small pictures of single images, inside the page: few, and bounded in bytes."""

from __future__ import annotations

import base64
import contextlib
import io
from typing import TYPE_CHECKING, Any

from launcher.images import datasets, members, pixels
from launcher.images.layouts import Source

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
    return [row | {"picture": _picture(_place(row["image"], data), data)} for row in rows]


def _place(image: str, data: DataConfig) -> str:
    return str(Source(path=str(datasets.data_path(data.name, data.path))).root / image)


def _picture(path: str, data: DataConfig) -> str | None:
    from PIL import Image

    with contextlib.suppress(Exception):  # whatever is wrong with it: the report goes without
        if members.stamp(path)[0] > MOST_FILE_BYTES:
            return None
        with Image.open(members.stream(path)) as image:
            image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at an eighth of its size where that does
            return data_uri(pixels.to_rgb(image, data.background_rgb, data.grey_limits))  # as the model is given it
    return None


def data_uri(image: PillowImage) -> str | None:
    """A small picture of an image (which is made small) for a page; None where it has too many bytes."""
    image.thumbnail((SIDE, SIDE))
    made = io.BytesIO()
    image.save(made, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(made.getvalue()).decode()}" if made.tell() <= MOST_BYTES else None
