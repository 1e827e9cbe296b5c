"""Pictures for TensorBoard, which has none of its own: curves, and small pictures with captions in a grid."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image as PillowImage

    from launcher.tracking.pictures import Picture

A_ROW = 4
CELL, LINE_PX, LINES = 120, 14, 2
"""Pixels of a picture's side, of which thumbnails have 112, and of each line of the caption below it."""
SIDE, MARGIN = 320, 40
"""Pixels of a chart's axes, and around them."""
TEXT, FAINT, LINE = "black", "#c8d2e0", "#1857b0"
RIGHT, WRONG = "#14713b", "#b3261e"
MOST_CHARACTERS = 20
"""Of a caption: more do not fit."""


def grid(pictures: Sequence[Picture]) -> bytes:
    """A PNG of the pictures with their captions, and below them the answers, green where right and red where wrong."""
    from PIL import Image, ImageDraw

    rows = -(-len(pictures) // A_ROW)
    height = CELL + LINES * LINE_PX + 4
    sheet = Image.new("RGB", (A_ROW * CELL, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        left, top = number % A_ROW * CELL, number // A_ROW * height
        small = Image.open(io.BytesIO(picture.jpeg)).convert("RGB")
        small.thumbnail((CELL - 4, CELL - 4))
        sheet.paste(small, (left + (CELL - small.width) // 2, top + (CELL - small.height) // 2))
        colour = TEXT if picture.is_right is None else RIGHT if picture.is_right else WRONG
        for line, text in enumerate(filter(None, (picture.caption, picture.answer))):
            _write(draw, (left + 4, top + CELL + line * LINE_PX), _short(text), colour)
    return _png(sheet)


def curves(found: Mapping[str, Any], title: str, x: str, y: str) -> bytes:
    """A PNG of curves over even places from 0 to 1: that of each class faint, their mean above them.

    Args:
        found: ``mean``, and ``classes`` by name.
        title: above it.
        x: name of the axis.
        y: likewise.
    """
    from PIL import Image, ImageDraw

    whole = SIDE + 2 * MARGIN
    sheet = Image.new("RGB", (whole, whole), "white")
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((MARGIN, MARGIN, MARGIN + SIDE, MARGIN + SIDE), outline=TEXT)
    for values, colour, width in [*((each, FAINT, 1) for each in found["classes"].values()), (found["mean"], LINE, 3)]:
        last = len(values) - 1
        points = [(MARGIN + SIDE * place / last, MARGIN + SIDE * (1 - value)) for place, value in enumerate(values)]
        draw.line(points, fill=colour, width=width)
    for place, text in (((MARGIN, 8), title), ((MARGIN, 24), f"{y}, from 0 to 1")):
        _write(draw, place, text, TEXT)
    _write(draw, (MARGIN, whole - MARGIN + 6), f"{x}, from 0 to 1", TEXT)
    return _png(sheet)


def _write(draw: Any, place: tuple[float, float], text: str, colour: str) -> None:
    """By Pillow's own font; what it has no letter for is a box."""
    from PIL import ImageFont

    try:
        font: Any = ImageFont.load_default(size=11)
    except (OSError, ImportError):  # a Pillow without FreeType: letters of Latin-1
        font, text = ImageFont.load_default(), text.encode("latin-1", "replace").decode("latin-1")
    draw.text(place, text, fill=colour, font=font)


def _short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"…{text[1 - MOST_CHARACTERS :]}"


def _png(image: PillowImage) -> bytes:
    made = io.BytesIO()
    image.save(made, "PNG")
    return made.getvalue()
