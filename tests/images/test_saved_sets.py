"""Data sets of Hugging Face's on disk: as `save_to_disk` leaves them, and folders with metadata.csv."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
from PIL import Image

from launcher import cli
from launcher.images import datasets, saved_sets
from launcher.images.listing import Listing
from launcher.images.source import Source


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A data set of three splits, and a single one."""
    library = pytest.importorskip("datasets")
    kinds = library.Features(
        {
            "picture": library.Image(),
            "label": library.ClassLabel(names=["cat", "dog"]),
            "tags": library.Sequence(library.ClassLabel(names=["x", "y", "z"])),
            "patient": library.Value("string"),
        }
    )
    rows = [
        {
            "picture": Image.new("RGB", (20, 18), (number * 9, 90, 90)),
            "label": number % 2,
            "tags": [[0], [1, 2], []][number % 3],
            "patient": str(number // 2),
        }
        for number in range(12)
    ]
    every = library.Dataset.from_list(rows, features=kinds)
    folder = tmp_path_factory.mktemp("saved")
    every.save_to_disk(folder / "one")
    parts = {"train": range(6), "validation": range(6, 9), "test": range(9, 12)}
    library.DatasetDict({name: every.select(part) for name, part in parts.items()}).save_to_disk(folder / "split")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def start(dry_run):
    """Exit code and what is printed of a run's checks, without its line breaks."""

    def run(*overrides):
        code, shown = dry_run(*overrides)
        return code, " ".join(shown.split())

    return run


def test_splits_classes_and_other_columns_are_those_of_the_data_set(saved, capsys):
    place = str(datasets.prepare("imagefolder", str(saved / "split")))
    found = Listing(Source(path=place, test="test"))
    assert [len(found.samples(split)) for split in ("train", "val", "test")] == [6, 3, 3]
    assert found.classes == ["cat", "dog"]
    assert [label for _, label in found.samples("train")] == [0, 0, 0, 1, 1, 1]
    several = Listing(Source(path=place, several=True, columns={"label": "tags"}))
    assert several.classes == ["x", "y", "z"]
    assert sorted(label for _, label in several.samples("val")) == [(), (0,), (1, 2)]
    one = str(datasets.prepare("imagefolder", str(saved / "one")))
    divided = Listing(Source(path=one, val_fraction=0.34, group="patient"))
    groups = [{int(path[-6:-4]) // 2 for path, _ in divided.samples(split)} for split in ("train", "val")]
    assert not groups[0] & groups[1]
    assert "its images are written once" in capsys.readouterr().err
    assert str(datasets.prepare("imagefolder", str(saved / "one"))) == one
    assert not capsys.readouterr().err


def test_the_command_line_takes_it_or_says_what_is_missing(saved, start, capsys, monkeypatch):
    assert start(f"data.path={saved / 'split'}")[0] == 0
    assert cli.main(["check", str(saved / "split"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"]["train"] == {"cat": 3, "dog": 3}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name != "datasets" and find(name, *more))
    shutil.rmtree(datasets.data_path("imagefolder", str(saved / "split")).parent, ignore_errors=True)
    code, shown = start(f"data.path={saved / 'split'}")
    assert code == 2
    assert f"was saved by Hugging Face's library datasets, which is not installed: {saved_sets.EXTRA}" in shown


def test_a_folder_with_a_metadata_table_is_a_list(images, tmp_path, start):
    for split, name in (("train", "train"), ("val", "validation")):
        (tmp_path / f"photos/{name}").mkdir(parents=True)
        lines = ["file_name,label"]
        for number, file in enumerate(sorted((images / split).glob("*/*.png"))):
            shutil.copy(file, tmp_path / f"photos/{name}/{number}.png")
            lines.append(f"{number}.png,{file.parent.name}")
        (tmp_path / f"photos/{name}/metadata.csv").write_text("\n".join([*lines, ""]))
    assert start(f"data.path={tmp_path / 'photos'}")[0] == 0
    found = Listing(Source(path=str(tmp_path / "photos")))
    assert [len(found.samples(split)) for split in ("train", "val")] == [18, 6]
    assert start(f"data.path={tmp_path / 'photos/train'}", "data.val_fraction=0.3")[0] == 0
    code, shown = start(f"data.path={tmp_path / 'photos/train'}")
    assert code == 2
    assert "data.val_fraction=0.2" in shown
