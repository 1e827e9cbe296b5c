"""Folders as people have them: links, hidden and system files, endings that nobody thought of, names in Unicode."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from launcher.images import folder as image_folder
from launcher.images import walk as image_walk
from launcher.images.folder import find_classes, find_problems, list_images
from launcher.images.left_out import describe_left_out, describe_spellings

CAFE = unicodedata.normalize("NFC", "café")
CAFE_DECOMPOSED = unicodedata.normalize("NFD", "café")


def make(folder, *files):
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.fixture
def data(tmp_path):
    """Two images of each of two classes in train/, and one in val/."""
    files = [f"train/{name}/{number}.jpg" for name in "ab" for number in range(2)]
    return make(tmp_path / "data", *files, "val/a/0.jpg", "val/b/0.jpg")


def listed(data, split="train"):
    folder = data / split
    classes = find_classes(folder)
    return [(Path(path).relative_to(data).as_posix(), classes[label]) for path, label in list_images(folder, classes)]


def left_out(data, split="train"):
    return describe_left_out(data / split, image_folder.walk(data / split, find_classes(data / split))[1])


PLAIN = [("train/a/0.jpg", "a"), ("train/a/1.jpg", "a"), ("train/b/0.jpg", "b"), ("train/b/1.jpg", "b")]


# Links


@pytest.mark.parametrize(
    "target", ["../a", "..", "../..", "../../..", ".", "../b", "../../val", "../../val/b", "../a/loop", "/"]
)
def test_a_link_to_a_folder_that_is_read_elsewhere_adds_nothing_and_is_told(target, data):
    (data / "train/a/loop").symlink_to(target)
    assert listed(data) == PLAIN
    assert find_problems(data) == []
    if target != "../a/loop":  # which leads to itself, and so nowhere
        (line,) = left_out(data)
        assert "1 link to folders whose images are read elsewhere" in line
        assert "train/a/loop -> /" in line


def test_links_deep_below_and_through_each_other_end(data):
    make(data, "train/a/deep/2.jpg", "train/b/deep/2.jpg")
    (data / "train/a/deep/up").symlink_to("..")
    (data / "train/a/deep/across").symlink_to("../../b/deep")
    (data / "train/b/deep/back").symlink_to("../../a/deep")
    assert listed(data) == sorted([*PLAIN, ("train/a/deep/2.jpg", "a"), ("train/b/deep/2.jpg", "b")])


def test_a_link_to_elsewhere_is_followed_once_whatever_lies_there(data, tmp_path):
    make(tmp_path / "more", "x.jpg", "inner/y.jpg")
    (tmp_path / "more/inner/up").symlink_to("..")
    (data / "train/a/more").symlink_to(tmp_path / "more")
    (data / "train/b/again").symlink_to(tmp_path / "more/inner")
    expected = [*PLAIN[:2], ("train/a/more/inner/y.jpg", "a"), ("train/a/more/x.jpg", "a"), *PLAIN[2:]]
    assert listed(data) == expected


def test_a_folder_belongs_to_the_class_in_which_it_lies_not_to_one_that_links_to_it(data):
    make(data, "train/b/sub/2.jpg")
    (data / "train/a/first").symlink_to("../b/sub")
    assert ("train/b/sub/2.jpg", "b") in listed(data)
    assert len(listed(data)) == 5


def test_class_folders_and_splits_that_are_links_are_read(data, tmp_path):
    shutil.move(data / "train/b", tmp_path / "b")
    (data / "train/b").symlink_to(tmp_path / "b")
    shutil.rmtree(data / "val")
    (data / "val").symlink_to("train")
    assert listed(data) == PLAIN
    assert [path for path, _ in listed(data, "val")] == [f"val/{path[6:]}" for path, _ in PLAIN]
    assert find_problems(data) == []


def test_one_folder_as_two_classes_is_refused_and_both_are_named(data):
    (data / "train/c").symlink_to("b")
    make(data, "val/c/0.jpg")
    assert find_problems(data) == [
        f"{data}/train: 'b' and 'c' are the same folder, {data}/train/b; an image has one class: remove one of them"
    ]


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_class_that_is_a_link_to_what_holds_it_is_refused(target, data):
    (data / "train/c").symlink_to(target)
    make(data, "val/c/0.jpg")
    (found,) = find_problems(data)
    assert found.startswith(f"{data}/train/c: a link to ")
    assert "holds the class folders; remove it" in found


def test_links_that_lead_nowhere_or_to_themselves_are_said(data):
    (data / "train/gone").symlink_to("nowhere")
    (data / "train/itself").symlink_to("itself")
    (data / "train/a/gone").symlink_to("nowhere")
    assert listed(data) == PLAIN
    assert find_classes(data / "train") == ["a", "b"]
    assert "train/: 3 links that lead nowhere" in left_out(data)[0]


# Hidden and system files


HIDDEN = (".ipynb_checkpoints", ".thumbnails", "thumbnails", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".git")


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("where", ["train/a", "train/a/deep/deeper"])
def test_hidden_and_system_folders_hold_no_images_at_any_depth_and_are_counted(name, where, data):
    make(data, f"{where}/{name}/0-checkpoint.jpg", f"{where}/{name}/inner/1.jpg")
    assert listed(data) == PLAIN
    assert left_out(data) == [
        f"train/: hidden and system files and folders left out, with 2 images: 1 {name}/",
    ]


@pytest.mark.parametrize("name", [name for name in HIDDEN if name != "thumbnails"])
def test_they_are_no_classes_either(name, data):
    make(data, f"train/{name}/0.jpg")
    assert find_classes(data / "train") == ["a", "b"]
    assert find_problems(data) == []


def test_hidden_and_system_files_are_no_images_and_are_counted(data):
    make(data, "train/a/._0.jpg", "train/a/._1.jpg", "train/b/.hidden.png", "train/b/Thumbs.db", "train/b/desktop.ini")
    assert listed(data) == PLAIN
    (line,) = left_out(data)
    assert "with 3 images: 2 ._*, 1 .*, 1 " in line


# Endings


@pytest.mark.parametrize(
    "ending",
    [".jfif", ".jpe", ".JFIF", ".jp2", ".j2k", ".avif", ".tga", ".ico", ".pcx", ".psd", ".pbm", ".apng", ".TIFF"],
)
def test_what_pillow_opens_here_is_an_image(ending, data):
    if not image_walk.is_image_ending(ending.lower()):
        pytest.skip("this Pillow was built without it")
    make(data, f"train/a/2{ending}")
    assert (f"train/a/2{ending}", "a") in listed(data)


@pytest.mark.parametrize("ending", [".eps", ".h5", ".mpg", ".pdf", ".wmf", ".txt", ".heic"])
def test_what_it_cannot_decode_is_none_and_is_counted_by_its_ending_with_the_cure(ending, data):
    make(data, *(f"train/a/x{number}{ending.upper()}" for number in range(11)), f"train/b/y{ending}")
    assert listed(data) == PLAIN
    (line,) = left_out(data)
    assert line.startswith(f"train/: 12 files {ending} left out (a 11, b 1): ")
    if ending == ".heic":
        assert line.endswith("convert them to JPEG or PNG")


def test_a_format_that_this_pillow_was_built_without_is_no_image(data, monkeypatch):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda name: False)
    image_walk.is_image_ending.cache_clear()
    make(data, "train/a/2.avif")
    assert listed(data) == PLAIN
    assert "install a Pillow that was built with AVIF" in left_out(data)[0]
    image_walk.is_image_ending.cache_clear()


def test_files_without_an_ending_and_images_in_no_class_are_said(data):
    make(data, "train/a/DSC0001", "train/stray.jpg")
    assert left_out(data) == [
        "train/: 1 file without an ending left out (a 1): give each its ending (.jpg, .png)",
        "train/: 1 image in no class folder, as train/stray.jpg; they have no class",
    ]


def test_a_class_of_nothing_but_such_files_says_what_they_are(data):
    make(data, "train/c/0.heic", "train/c/1.heic", "val/c/0.jpg")
    (found,) = find_problems(data)
    assert "no images in 'c'" in found
    assert "2 files .heic left out (c 2): convert them to JPEG or PNG" in found


# Unicode


def test_composed_and_decomposed_letters_are_one_class_name_and_both_are_said(data):
    make(data, f"train/{CAFE}/0.jpg", f"train/{CAFE_DECOMPOSED}/1.jpg", f"val/{CAFE_DECOMPOSED}/0.jpg")
    assert find_problems(data) == []
    assert len(find_classes(data / "train")) == 3
    labels = [label for _, label in list_images(data / "train", find_classes(data / "train"))]
    assert labels == [0, 0, 1, 1, 2, 2]
    assert [label for _, label in list_images(data / "val", find_classes(data / "train"))] == [0, 1, 2]
    (line,) = describe_spellings(data)
    assert ascii(CAFE) in line
    assert ascii(CAFE_DECOMPOSED) in line
    assert f"val/{CAFE_DECOMPOSED}" in line


def test_a_name_spelled_in_one_way_everywhere_is_not_worth_a_word(data):
    make(data, f"train/{CAFE}/0.jpg", f"val/{CAFE}/0.jpg")
    assert describe_spellings(data) == []


# One class, and classes that validation lacks


def test_one_class_is_refused_with_what_to_do(data):
    shutil.rmtree(data / "train/b")
    shutil.rmtree(data / "val/b")
    (found,) = find_problems(data)
    assert f"{data}/train: one class folder, 'a'; a classifier tells two or more apart" in found


@pytest.mark.parametrize("how", ["no folder", "an empty folder"])
def test_a_class_that_validation_lacks_is_refused_or_allowed(how, data):
    shutil.rmtree(data / "val/b")
    if how == "an empty folder":
        (data / "val/b").mkdir()
    assert len(find_problems(data)) == 1
    assert find_problems(data, missing_val_classes="allow") == []
    if how == "no folder":
        assert "data.missing_val_classes=allow" in find_problems(data)[0]


def test_validation_without_images_or_with_a_class_of_its_own_is_refused(data):
    make(data, "val/c/0.jpg")
    assert "'c' in val/ but not in train/" in find_problems(data, missing_val_classes="allow")[0]
    shutil.rmtree(data / "val")
    for name in "ab":
        (data / f"val/{name}").mkdir(parents=True)
    assert "no images in 'a', 'b'" in find_problems(data, missing_val_classes="allow")[0]


# As a user sees it


def test_check_says_all_of_it_and_a_run_is_refused_with_exit_code_2(launch, tmp_path):
    data = tmp_path / "photos"
    for number, name in enumerate(("train/a/0", "train/a/1", "train/b/0", "val/a/0", "val/b/0")):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(data / f"{name}.jpg")
    make(data, "train/a/x.heic", "train/a/._0.jpg", "train/a/.ipynb_checkpoints/0.jpg")
    (data / "train/a/loop").symlink_to("..")
    done = launch("check", str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning  train/: 1 file .heic left out (a 1): convert them to JPEG or PNG" in done.stdout
    assert "warning  train/: hidden and system files and folders left out, with 2 images" in done.stdout
    assert f"train/a/loop -> {data}/train" in done.stdout
    assert len(json.loads(launch("check", str(data), "--json").stdout)["left_out"]) == 3
    shutil.rmtree(data / "train/b")
    shutil.rmtree(data / "val/b")
    refused = launch("photos_mobilenet_v2", f"data.path={data}", "--run-dir", str(tmp_path / "run"))
    assert refused.returncode == 2
    assert "one class folder, 'a'" in refused.stderr
    assert not (tmp_path / "run").exists()
