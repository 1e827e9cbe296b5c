"""Images with more than 8 bits: what a whole data set's values say about the range that they were saved with."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from launcher.images import scan as image_scan
from launcher.images.levels import judge
from launcher.recipe.schema_data import DataConfig

GREY, COLOURS = "16 bits", "colours of 16 bits"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(images, tmp_path):
    return shutil.copytree(images, tmp_path / "photos")


def save(path, low, high, kind):
    Image.fromarray(np.linspace(low, high, 400).reshape(20, 20).astype(kind)).save(path)


@pytest.mark.parametrize("high", [255, 1023, 4095, 16383, 32767])
def test_16_bits_whose_highest_bit_no_image_uses_are_refused_with_the_range_seen(high, folder):
    save(folder / "train/cat/a.png", 10, high, "uint16")
    save(folder / "train/dog/b.tif", 0, high // 2, "uint16")
    found = {image.path: image for image in image_scan.scan(folder).bad}
    assert set(found) == {"train/cat/a.png", "train/dog/b.tif"}
    assert found["train/cat/a.png"].kind == "grey_range"
    assert f"16 bits from 10 to {high}, and no such image of this data set has more than {high}" in str(
        found["train/cat/a.png"]
    )
    assert "data.grey_range=[0, 4095]" in found["train/cat/a.png"].cure
    assert image_scan.scan(folder, grey_range=(0, high)).bad == []


def test_a_dark_image_among_bright_ones_and_a_black_one_are_good(folder):
    save(folder / "train/cat/a.png", 0, 4095, "uint16")
    save(folder / "train/cat/b.png", 0, 65535, "uint16")
    assert image_scan.scan(folder).bad == []
    save(folder / "train/cat/b.png", 0, 0, "uint16")
    save(folder / "train/cat/a.png", 0, 0, "uint16")
    assert image_scan.scan(folder).bad == []


@pytest.mark.parametrize(
    ("low", "high", "kind", "said"),
    [(0, 255, "int32", "integers from 0 to 255"), (0, 255, "float32", "floats from 0 to 255")],
)
def test_floats_beyond_1_and_integers_need_a_range(low, high, kind, said, folder):
    save(folder / "train/cat/a.tif", low, high, kind)
    save(folder / "val/cat/a.tif", 0, 1, "float32")
    (found,) = image_scan.scan(folder).bad
    assert said in found.message
    shutil.copy(folder / "train/cat/a.tif", folder / "val/cat/a.tif")
    assert image_scan.scan(folder, grey_range=(0, 255)).bad == []
    assert image_scan.scan(folder).num_read == 0  # the judgement is made anew, the files are not read again


def test_values_that_are_no_numbers_are_bad_whatever_the_range(folder):
    save(folder / "train/cat/a.tif", 0, float("nan"), "float32")
    for grey_range in (None, (0, 1)):
        assert [image.kind for image in image_scan.scan(folder, grey_range=grey_range).bad] == ["not_finite"]


@pytest.mark.parametrize(
    ("levels", "grey_range", "good"),
    [
        ((COLOURS, 0, 4112.0), None, False),
        ((COLOURS, 0, 4112.0), (0, 4095), False),
        ((COLOURS, 0, 4112.0), (0, 65535), True),  # they are that dark, it says
        ((COLOURS, 0, 65535.0), None, True),
        ((GREY, 0, 4095), (0, 65535), True),
        (None, None, True),
    ],
)
def test_colours_of_16_bits_cannot_be_rescaled(levels, grey_range, good):
    assert (judge([levels], grey_range)(levels) == "") is good


def test_one_range_for_kinds_that_it_cannot_both_fit_is_refused():
    floats, deep = ("floats", 0.0, 1.0), (GREY, 0, 4095)
    problem = judge([floats, deep], (0, 4095))
    assert "fits other images of this data set, and not these" in problem(floats)
    assert problem(deep) == ""


def test_check_names_the_range_and_takes_the_recipes_words(launch, folder):
    save(folder / "train/cat/a.png", 0, 4095, "uint16")
    Image.new("RGBA", (20, 20), (1, 2, 3, 0)).save(folder / "train/cat/b.png")
    Image.new("RGB", (200, 2)).save(folder / "train/cat/c.png")
    done = launch("check", str(folder))
    assert done.returncode == 3
    assert "problem  1 image that cannot be used with the values they have" in done.stdout
    assert "train/cat/a.png: grey range: 16 bits from 0 to 4095" in done.stdout
    assert "note     images of 16 bits have values from 0 to 4095" in done.stdout
    assert "note     1 wholly transparent, so that only data.background is seen, as train/cat/b.png" in done.stdout
    assert "note     1 more than 8 times as long as wide, of which only the centre is seen" in done.stdout
    told = launch("check", str(folder), "data.grey_range=[0, 4095]", "--json")
    assert told.returncode == 0, told.stdout
    assert json.loads(told.stdout)["levels"] == {"16 bits": [0, 4095]}
    wrong = launch("check", str(folder), "data.grey_range=4095", "data.backgrund=white")
    assert wrong.returncode == 2
    assert "2 problems in the overrides" in wrong.stderr
    assert "did you mean 'background'?" in wrong.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("grey", (128,) * 3), ("#148082", (20, 128, 130))],
)
def test_a_background_is_a_name_or_a_colour(name, expected):
    assert DataConfig(background=name).background_rgb == expected
