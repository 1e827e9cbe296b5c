from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from launcher.images import datasets
from launcher.images import folder as image_folder
from launcher.images.folder import find_classes, find_problems, list_images


def make(folder, *files):
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_a_folder_that_can_be_trained_on_has_no_problems(images):
    assert find_problems(images) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["photos/a.jpg"], [r"no train/ and no val/ in it \(found photos\)"]),
        (["a.jpg"], [r"no train/ and no val/ in it \(found no folders\)"]),
        (["train/cat/1.jpg"], [r"no val/ in it \(found train\)"]),
        (["val/cat/1.jpg", "training/cat/1.jpg"], [r"no train/ in it \(found training, val\)"]),
        (["train", "val/cat/1.jpg"], [r"no train/ in it"]),  # a file of that name is no folder
        (
            ["train/1.jpg", "val/cat/1.jpg"],
            [r"train: no class folders in it; put each class's images into train/CLASS/"],
        ),
        (["train/1.jpg", "val/1.jpg"], [r"train: no class folders", r"val: no class folders"]),
        (
            ["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg"],
            [r"'dog' in train/ but not in val/; both must have the same class folders"],
        ),
        (
            ["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/Dog/1.jpg"],
            [r"'dog' in train/ but not in val/", r"'Dog' in val/ but not in train/"],
        ),
        (
            ["train/cat/1.jpg", "train/dog/readme.txt", "val/cat/1.jpg", "val/dog/1.jpg"],
            [r"train: no images in 'dog' \(looked for \.jpg, \.jpeg, \.png"],
        ),
        (
            ["train/cat/1.jpg", "val/cat/1.txt", "val/dog/1.jpg"],
            [r"'dog' in val/ but not in train/", r"val: no images in 'cat'"],
        ),
    ],
)
def test_each_problem_says_where_and_what_is_wanted(files, expected, tmp_path):
    found = find_problems(make(tmp_path, *files))
    assert len(found) == len(expected)
    for text, pattern in zip(found, expected, strict=True):
        assert text.startswith(str(tmp_path))
        assert re.search(pattern, text)


@pytest.mark.parametrize("what", ["nothing", "file"])
def test_what_is_no_folder_is_said_with_the_layout_that_is_wanted(what, tmp_path):
    path = tmp_path / what
    if what == "file":
        path.touch()
    assert find_problems(path) == [f"{path}: no such folder; it must hold train/CLASS/*.jpg and val/CLASS/*.jpg"]


def test_of_many_classes_only_a_few_are_named(tmp_path):
    make(tmp_path, *(f"train/{n:02d}/1.jpg" for n in range(12)), "val/00/1.jpg")
    assert "'01', '02', '03', '04', '05' and 6 more in train/" in find_problems(tmp_path)[0]


def test_classes_are_the_folders_in_alphabetical_order(tmp_path):
    make(tmp_path, "dog/1.jpg", "Cat/1.jpg", "cat/1.jpg", ".ipynb_checkpoints/1.jpg", "notes.txt")
    (tmp_path / "elk").symlink_to(tmp_path / "dog")
    assert find_classes(tmp_path) == ["Cat", "cat", "dog", "elk"]


@pytest.mark.parametrize("name", ["a.jpg", "a.JPG", "a.Jpeg", "a.png", "a.webp", "a.tiff", "deeper/still/a.bmp"])
def test_images_are_found_by_extension_in_any_case_and_at_any_depth(name, tmp_path):
    make(tmp_path, f"cat/{name}", "cat/a.txt", "cat/jpg", "cat/a.jpg.part")
    assert list_images(tmp_path, ["cat"]) == [(str(tmp_path / "cat" / name), 0)]


def test_images_are_in_the_same_order_whatever_order_the_disk_has_them_in(tmp_path):
    names = ["b.jpg", "a/z.jpg", "a/b.jpg", "a.jpg", "10.jpg", "9.jpg"]
    first = make(tmp_path / "first", *(f"{c}/{n}" for c in ("cat", "dog") for n in names))
    second = make(tmp_path / "second", *(f"{c}/{n}" for c in ("dog", "cat") for n in reversed(names)))
    listed = [
        [(Path(path).relative_to(folder).as_posix(), index) for path, index in list_images(folder, ["cat", "dog"])]
        for folder in (first, second)
    ]
    assert listed[0] == listed[1]
    assert listed[0] == sorted(listed[0], key=lambda item: (item[1], item[0]))
    assert len(listed[0]) == 2 * len(names)


def test_labels_follow_the_classes_given_and_not_the_split(images, tmp_path):
    shutil.copytree(images, tmp_path / "photos")
    shutil.rmtree(tmp_path / "photos/val/cat")
    found = list_images(tmp_path / "photos/val", ["cat", "dog", "fox"])
    assert [(Path(path).parent.name, index) for path, index in found] == [("dog", 1)] * 2 + [("fox", 2)] * 2


def test_a_linked_class_folder_is_followed(tmp_path):
    make(tmp_path, "elsewhere/1.jpg")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/cat").symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path / "train", ["cat"]) == [(str(tmp_path / "train/cat/1.jpg"), 0)]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FINETUNE_LAUNCHER_CACHE": "/own", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/own"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/finetune-launcher"),
        ({"HOME": "/h"}, "/h/.cache/finetune-launcher"),
        ({"FINETUNE_LAUNCHER_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/finetune-launcher"),
    ],
)
def test_where_the_cache_is(environment, expected, monkeypatch):
    for name in ("FINETUNE_LAUNCHER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert image_folder.cache_dir() == Path(expected)
    assert datasets.data_path("digits", None) == Path(expected) / "digits"


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert datasets.data_path("imagefolder", "~/photos") == Path("/h/photos")
