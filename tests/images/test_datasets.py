"""The table of data sets that a recipe can name."""

from __future__ import annotations

import pytest
from PIL import Image

from launcher.errors import UsageError
from launcher.images import datasets
from launcher.images.datasets import DATASETS, NamedDataset


def write_dots(target):
    for split in ("train", "val"):
        for name in ("black", "white"):
            (target / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), name).save(target / split / name / "0.png")


@pytest.fixture
def dots(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(DATASETS, "dots", NamedDataset(write=write_dots, title="dots"))


def test_a_row_is_all_that_a_data_set_needs(dots):
    folder = datasets.prepare("dots", None)
    assert folder == datasets.data_path("dots", None)
    assert sorted(path.name for path in (folder / "train").iterdir()) == ["black", "white"]
    before = (folder / "train" / "white" / "0.png").stat().st_mtime_ns
    assert datasets.prepare("dots", None) == folder
    assert (folder / "train" / "white" / "0.png").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == ["dots"]


def test_what_is_needed_to_write_one_is_said(monkeypatch, dots):
    row = NamedDataset(write=write_dots, module="no_such_module", install="rare-one")
    monkeypatch.setitem(DATASETS, "rare", row)
    assert datasets.find_problem("rare") == "rare come from rare-one, which is not installed: pip install rare-one"
    assert datasets.find_problem("dots") is None
    assert datasets.find_problem("imagefolder") is None


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, dots, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"the dots cannot be written to .*FINETUNE_LAUNCHER_CACHE"):
        datasets.prepare("dots", None)
