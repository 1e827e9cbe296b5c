"""An image is known by the same key however the place of the images is written."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from launcher.images import division, lists
from launcher.images import folder as image_folder
from launcher.images.listing import Listing
from launcher.images.scan import scan
from launcher.images.source import Source

NAMES = ("cat", "dog")


def paint(folder, num=4):
    for place, name in enumerate(NAMES):
        for number in range(num):
            file = folder / name / f"{number}..{place}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 8), (60 * place, 30 * number, 9)).save(file)
    return sorted(folder.rglob("*.png"))


def write_list(file, images):
    lines = [f"{os.path.relpath(image, file.parent)},{image.parent.name}\n" for image in images]
    file.write_text("path,label\n" + "".join(lines))


def found(path, **further):
    """The division with the keys, and those that are bad, of a listing."""
    listing = Listing(Source(path=path, **further))
    of_split = {split: {listing.key(path) for path, _ in listing.samples(split)} for split in ("train", "val")}
    return of_split, {image.path for image in scan(listing).bad}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


@pytest.mark.parametrize(("images", "start"), [("here/lists/photos", "photos/"), ("photos", "../../photos/")])
def test_images_of_a_list(here, images, start):
    painted = paint(here.parent / images)
    painted[1].write_bytes(b"no image")
    (here / "lists").mkdir(exist_ok=True)
    write_list(here / "lists" / "all.csv", painted)
    absolute = found(str(here / "lists" / "all.csv"), val_fraction=0.25)
    assert found("lists/all.csv", val_fraction=0.25) == found("../here/lists/all.csv", val_fraction=0.25) == absolute
    assert all(key.startswith(start) for keys in absolute[0].values() for key in keys)
    assert len(absolute[0]["val"]) == 2
    assert absolute[1] == {f"{start}cat/1..0.png"}


def test_images_of_a_folder_of_lists(here):
    for split in ("train", "val"):
        write_list((here / split).with_suffix(".csv"), paint(here / "photos" / split))
    assert found(".") == found("../here") == found(str(here))
    assert "photos/train/cat/0..0.png" in found(".")[0]["train"]


def test_images_of_folders_keep_the_keys_that_runs_know(here):
    for split in ("train", "val"):
        paint(here / split)
    assert found(".") == found("../here") == found(str(here))
    assert found(".")[0]["val"] == {
        f"val/{name}/{i}..{place}.png" for place, name in enumerate(NAMES) for i in range(4)
    }
    assert image_folder.relative("/a/b/train/cat/1.jpg", here.__class__("/a/b")) == "train/cat/1.jpg"


def test_a_list_with_an_index_without_a_name_is_read(here):
    """As pandas' to_csv() writes it."""
    (here / "list.csv").write_text(",path,label\n0,a.png,cat\n1,b.png,dog\n")
    assert [row.labels for row in lists.read(here / "list.csv", lists.Form())] == [("cat",), ("dog",)]
    (here / "list.csv").write_text(",path,label\n0,a.png,cat,5\n")
    with pytest.raises(lists.ListError, match=r":2: 1 more fields than the first line names"):
        lists.read(here / "list.csv", lists.Form())


def test_other_classes_are_of_the_same_division(here, monkeypatch):
    paint(here)
    listing = Listing(Source(path=".", val_fraction=0.25))
    val = listing.samples("val")
    monkeypatch.setattr(division, "divide", None)
    assert sorted(path for path, _ in listing.with_classes(["dog", "cat"]).samples("val")) == [path for path, _ in val]
