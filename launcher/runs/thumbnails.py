"""Small pictures of single images, for the report and for those that track the run: few, and bounded in bytes."""

from __future__ import annotations

import base64
import contextlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.images import pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    return [row | {"picture": _data_uri(jpeg(row["image"], data))} for row in rows]


def _data_uri(picture: bytes | None) -> str | None:
    return None if picture is None else f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


def _place(image: str, data_path: str | None) -> Path:
    path = Path(image)
    return path if path.is_absolute() or not data_path else Path(os.path.expanduser(data_path)) / path  # noqa: PTH111


def jpeg(image: str, data: DataConfig) -> bytes | None:
    """An image as the model is given it, small; None where it is not there any more, or no picture is made."""
    from PIL import Image

    path = _place(image, data.path)
    with contextlib.suppress(Exception):  # whatever is wrong with it: the report goes without
        if not path.is_file() or path.stat().st_size > MOST_FILE_BYTES:
            return None
        with Image.open(path) as opened:
            opened.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at an eighth of its size where that does
            small = pixels.to_rgb(opened, data.background_rgb, data.grey_limits)
            small.thumbnail((SIDE, SIDE))
        made = io.BytesIO()
        small.save(made, "JPEG", quality=QUALITY, optimize=True)
        if made.tell() <= MOST_BYTES:
            return made.getvalue()
    return None
