"""Small pictures in the page are what the model is given: upright, on its background, grey as the recipe scales it."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from launcher.recipe.schema_data import DataConfig
from launcher.runs import thumbnails

PINK = (255, 0, 128)
BACKGROUND = "#148082"


def turned(path):
    image = Image.new("RGB", (80, 40), "red")
    exif = image.getexif()
    exif[274] = 6  # orientation: turn it right
    image.save(path, exif=exif)


def transparent(path):
    Image.new("RGBA", (40, 40), (*PINK, 0)).save(path)


def deep(path):
    Image.fromarray(np.full((40, 40), 2048, np.uint16)).save(path)


@pytest.mark.parametrize(
    ("write", "data", "size", "colour"),
    [
        (turned, {}, (40, 80), (255, 0, 0)),
        (transparent, {"background": BACKGROUND}, (40, 40), (0x14, 0x80, 0x82)),
        (deep, {"grey_range": [0, 4096]}, (40, 40), (128, 128, 128)),
        (deep, {}, (40, 40), (8, 8, 8)),
    ],
    ids=["turned", "transparent", "12 bits", "16 bits"],
)
def test_a_thumbnail_is_what_the_model_is_given(write, data, size, colour, tmp_path):
    name = "photo.jpg" if write is turned else "photo.png"
    write(tmp_path / name)
    (row,) = thumbnails.with_pictures([{"image": name}], DataConfig(path=str(tmp_path), **data))
    with Image.open(io.BytesIO(base64.b64decode(row["picture"].split(",")[1]))) as found:
        assert found.size == size
        assert found.getpixel((20, 20)) == pytest.approx(colour, abs=4)


def test_where_images_cannot_be_looked_for_there_are_no_pictures():
    """Such a folder raises where it is asked what it is, as one does that another user must not enter."""
    rows = [{"image": "a.jpg"}, {"image": "b.jpg"}]
    assert thumbnails.with_pictures(rows, DataConfig(path="x" * 300)) == [row | {"picture": None} for row in rows]
