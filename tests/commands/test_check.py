from __future__ import annotations

import json
import shutil

import pytest

from launcher.commands import check


@pytest.fixture
def folder(images, tmp_path):
    return shutil.copytree(images, tmp_path / "photos")


def lines_with(output, word):
    return [line for line in output.splitlines() if word in line]


def test_a_good_folder_is_counted_and_ends_with_0(launch, folder):
    done = launch("check", str(folder))
    assert done.returncode == 0, done.stderr
    assert lines_with(done.stdout, "train/")[0].endswith("18 images in 3 classes: 6 in each")
    assert lines_with(done.stdout, "val/")[0].endswith("6 images in 3 classes: 2 in each")
    assert done.stdout.splitlines()[-1].startswith(f"24 images in {folder}: 24 were read")
    assert "problem" not in done.stdout
    again = launch("check", str(folder))
    assert "0 were read, 24 have not changed" in again.stdout


def test_each_bad_file_has_its_path_its_kind_and_a_cure_and_the_exit_code_is_3(launch, folder):
    (folder / "train/cat/0.png").write_bytes(b"")
    (folder / "val/dog/1.png").write_text("<html>")
    done = launch("check", str(folder))
    assert done.returncode == 3
    assert "problem  2 images that cannot be decoded; data.on_bad_image=quarantine would leave out:" in done.stdout
    assert "train/cat/0.png: empty: 0 bytes; copy it again, or remove it" in done.stdout
    assert "val/dog/1.png: not an image: begins with b'<html>'; remove it" in done.stdout
    assert lines_with(done.stdout, "train/")[0].endswith("5 (cat) to 6 (dog), the median is 6")


def test_of_many_bad_files_some_are_shown_and_json_has_all(launch, folder):
    for number in range(30):
        (folder / f"train/cat/bad{number:02d}.png").write_bytes(b"")
    done = launch("check", str(folder))
    assert len(lines_with(done.stdout, ": empty: ")) == check.NUM_SHOWN
    assert "and 10 more (--json has all)" in done.stdout
    found = json.loads(launch("check", str(folder), "--json").stdout)
    assert len(found["bad"]) == 30
    assert found["ok"] is False
    assert found["bad"][0] == {
        "path": "train/cat/bad00.png",
        "split": "train",
        "kind": "empty",
        "message": "0 bytes",
        "cure": "copy it again, or remove it",
    }


def test_what_is_there_twice_and_what_is_unusual_is_said_and_is_no_failure(launch, folder):
    shutil.copy(folder / "train/cat/0.png", folder / "val/cat/same.png")
    shutil.copy(folder / "train/cat/1.png", folder / "train/dog/same.png")
    from PIL import Image

    Image.new("CMYK", (20, 20)).save(folder / "train/fox/c.jpg")
    done = launch("check", str(folder))
    assert done.returncode == 0
    assert "warning  1 image of val/ also in train/, byte for byte" in done.stdout
    assert "val/cat/same.png is train/cat/0.png" in done.stdout
    assert "warning  1 image of train/ in more than one class, byte for byte" in done.stdout
    assert "train/cat/1.png, train/dog/same.png" in done.stdout
    assert "note     1 CMYK, turned into RGB, as train/fox/c.jpg" in done.stdout
    found = json.loads(launch("check", str(folder), "--json").stdout)
    assert found["ok"] is True
    assert found["leaks"] == [{"train": "train/cat/0.png", "val": "val/cat/same.png"}]
    assert found["contradictions"] == [["train/cat/1.png", "train/dog/same.png"]]
    assert found["notes"] == {"cmyk": ["train/fox/c.jpg"]}
    assert found["classes"]["train"] == {"cat": 6, "dog": 7, "fox": 7}


def test_one_class_with_many_more_images_than_another_is_a_warning(launch, folder):
    for number in range(6, 20):
        for name in ("cat", "dog", "fox"):
            shutil.copy(folder / f"train/{name}/0.png", folder / f"train/{name}/{number}.png")
    for number in range(20, 220):
        shutil.copy(folder / "train/cat/0.png", folder / f"train/cat/{number}.png")
    done = launch("check", str(folder))
    assert "warning  cat has 11 times the images of dog" in done.stdout
    assert "fewer than 10 images in 3 of them" in done.stdout  # val


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "val"), "no val/ in it"),
        (lambda folder: shutil.rmtree(folder / "train/cat"), "'cat' in val/ but not in train/"),
        (lambda folder: [file.unlink() for file in (folder / "val/fox").iterdir()], "no images in 'fox'"),
    ],
)
def test_what_is_wrong_with_the_folders_is_a_problem_too(harm, said, launch, folder):
    harm(folder)
    done = launch("check", str(folder))
    assert done.returncode == 3
    assert said in lines_with(done.stdout, "problem")[0]
    assert "images in" in done.stdout  # the rest is looked through all the same


def test_a_folder_that_is_not_there_is_a_wrong_command_line(launch):
    done = launch("check", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere: no such folder")
    assert launch("check").returncode == 2


def test_names_that_are_no_text_can_be_printed(launch, folder):
    (folder / "train/cat/0.png").rename(folder / "train/cat/a\udcff.png")
    done = launch("check", str(folder), env={"LC_ALL": "C.UTF-8"})
    assert done.returncode == 3, done.stderr
    assert "train/cat/a\\udcff.png: unreadable: its name is not UTF-8; correct its permissions, its name" in done.stdout


def test_keys_that_are_lacking_are_named_for_this_very_command(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images / "train", tmp_path / "photos/all")
    assert check.main(["photos"]) == 3
    shown = capsys.readouterr().out
    assert "\n      launch check photos/all data.val_fraction=0.2\n" in shown
    assert shown.endswith("\nno image in photos was looked at\n")


def test_a_folder_of_classes_is_looked_through_as_it_would_be_divided(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images / "train", tmp_path / "photos")
    assert check.main(["photos"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("note     nothing says which images are for validation: here 20% of each class are; ")
    assert "train/   15 images in 3 classes: 5 in each" in shown
    (tmp_path / "photos/cat/0.png").write_bytes(b"")
    assert check.main(["photos"]) == 3
    assert "cat/0.png: empty: 0 bytes" in capsys.readouterr().out
    (tmp_path / "photos/cat/0.png").unlink()
    (tmp_path / "photos/elk").mkdir()
    assert check.main(["photos"]) == 3
    shown = capsys.readouterr().out
    assert "problem  photos: no images in 'elk'" in shown  # and the others were looked at
    assert "17 images in photos: " in shown
    (tmp_path / "photos/elk").rmdir()
    for overrides, fraction in ((), 0.2), (("data.background=black",), 0.2), (("data.val_fraction=0.34",), None):
        assert check.main(["photos", *overrides, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["val_fraction"] == fraction
