"""data.cache: pixels that are kept show what the files show, and are kept whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launcher.engine.data import ImageDataset, Preprocessing
from launcher.engine.loading import keep_pixels, kept_pixels
from launcher.engine.loading.keep_pixels import DoWithoutError, keep
from launcher.engine.loading.kept_pixels import Index, index_file
from launcher.recipe.schema_data import DataConfig

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PREPROCESSING = Preprocessing(image_size=32, resize_size=36, interpolation="bilinear", **IMAGENET)
NUM, LARGE = 24, 5000
"""Images, and bytes of a file of the large ones."""


@pytest.fixture(autouse=True)
def no_margin(monkeypatch):
    """A few small images fit wherever there is any room: how full this machine's disk is shall not matter."""
    monkeypatch.setattr(keep_pixels, "MOST_MARGIN", 0)


@pytest.fixture
def images(tmp_path):
    """JPEG files of two classes; some are small, some large."""
    rng = np.random.default_rng(0)
    for number in range(NUM):
        path = tmp_path / "images" / "train" / "ab"[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (3, 4, 3)).astype("uint8"))
        noise.resize((30, 36) if number < NUM // 2 else (300, 200), Image.Resampling.BICUBIC).save(path, quality=95)
    return tmp_path / "images"


class Kept:
    """A split, with and without its pixels kept."""

    def __init__(self, images, root, augment):
        self.keeping = PREPROCESSING.keeping(DataConfig(augment=augment))
        self.folder = self.keeping.folder(root, images, "train")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._images, self._augment, self._root = images, augment, root

    def dataset(self):
        read = PREPROCESSING.read if self._augment == "none" else PREPROCESSING.open
        return ImageDataset(self._images, "train", PREPROCESSING.transform(self._augment), seed=0, read=read)

    def keep(self):
        """How many images were decoded for it."""
        return keep(self.dataset(), self.keeping, self.folder, in_ram=False, what="train")[1]

    def kept(self, monkeypatch):
        monkeypatch.setenv(kept_pixels.FOLDER_VARIABLE, str(self._root))
        dataset = self.dataset()
        dataset.use_kept("train", self.keeping)
        return dataset

    @property
    def file(self):
        return index_file(self.folder, self.dataset().digest)


@pytest.fixture
def split(images, tmp_path):
    return lambda augment="standard": Kept(images, tmp_path / "pixels", augment)


def unread(monkeypatch):
    """From now on no file can be read."""
    for name in ("open", "read"):
        monkeypatch.setattr(Preprocessing, name, lambda *_: pytest.fail("a file was read"))


@pytest.mark.parametrize("augment", ["none", "light", "standard"])
def test_what_is_kept_shows_what_the_files_show(augment, split, monkeypatch):
    """To the bit where it is validation's centre, or a picture no larger than crops need."""
    one = split(augment)
    from_files = [one.dataset()[2, number] for number in range(NUM)]
    assert one.keep() == NUM
    unread(monkeypatch)
    kept = one.kept(monkeypatch)
    for number, (expected, label) in enumerate(from_files):
        found, its_label = kept[2, number]
        assert its_label == label
        assert found.shape == expected.shape == (3, 32, 32)
        path = Path(kept.samples[number][0])
        if augment == "none" or path.stat().st_size < LARGE:
            assert torch.equal(found, expected)
        assert (found.float() - expected.float()).abs().mean() < 4


def test_no_picture_is_kept_larger_than_the_smallest_crop_needs(split):
    one = split("standard")
    one.keep()
    assert one.keeping.short_side == 64
    rows = Index.read(one.file).rows
    assert sorted({tuple(row) for row in rows[:, 2:6].tolist()}) == [(36, 30, 36, 30), (64, 96, 200, 300)]
    assert sum(file.stat().st_size for file in one.folder.glob("*.pixels")) == NUM // 2 * 3 * (36 * 30 + 64 * 96)


def test_a_later_run_decodes_nothing_and_one_with_other_settings_everything(split, images, tmp_path):
    assert split().keep() == NUM
    assert split().keep() == 0
    assert split("light").keep() == NUM
    assert split().keep() == 0


def test_an_image_that_was_changed_is_decoded_again_and_no_other(split, images, monkeypatch):
    one = split()
    one.keep()
    path = sorted((images / "train" / "a").iterdir())[3]
    Image.new("RGB", (80, 80), (250, 10, 10)).save(path)
    assert one.keep() == 1
    unread(monkeypatch)
    kept = one.kept(monkeypatch)
    number = [sample[0] for sample in kept.samples].index(str(path))
    assert kept[0, number][0].float().mean((1, 2)).round().tolist() == pytest.approx([250, 10, 10], abs=3)


def test_a_listing_with_more_and_fewer_images_takes_what_is_kept(split, images):
    one = split()
    one.keep()
    min((images / "train" / "a").iterdir()).unlink()
    shutil.copy(min((images / "train" / "b").iterdir()), images / "train" / "b" / "new.jpg")
    assert one.keep() == 1
    assert one.keep() == 0


def test_an_image_that_cannot_be_decoded_is_not_kept_and_read_as_ever(split, images, monkeypatch):
    bad = min((images / "train" / "b").iterdir())
    bad.write_bytes(bad.read_bytes()[:100])
    one = split()
    one.keep()
    kept = one.kept(monkeypatch)
    number = [sample[0] for sample in kept.samples].index(str(bad))
    with pytest.raises(Exception, match=str(bad)):
        kept[0, number]
    kept[0, 0]


@pytest.mark.parametrize("damage", ["index cut", "pixels cut", "pixels gone"])
def test_what_is_damaged_is_not_used_and_made_anew(damage, split, monkeypatch):
    one = split()
    one.keep()
    file = one.file if damage == "index cut" else next(one.folder.glob("*.pixels"))
    if damage == "pixels gone":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    assert one.kept(monkeypatch)._kept is None
    assert one.keep() == NUM
    assert one.kept(monkeypatch)._kept is not None


def test_without_a_word_of_the_supervisor_nothing_kept_is_used(split, monkeypatch):
    one = split()
    one.keep()
    monkeypatch.delenv(kept_pixels.FOLDER_VARIABLE, raising=False)
    dataset = one.dataset()
    dataset.use_kept("train", one.keeping)
    assert dataset._kept is None


# Where it goes wrong


def test_what_does_not_fit_is_not_begun(split, monkeypatch):
    one = split()
    monkeypatch.setattr(keep_pixels, "_room", lambda *_, **__: 1000)
    with pytest.raises(DoWithoutError, match=r"take 0.00 GB, and of .* may be taken"):
        one.keep()
    assert [file.name for file in one.folder.iterdir()] == ["lock"]


def test_what_turns_out_not_to_fit_is_removed(split, monkeypatch):
    one = split()
    monkeypatch.setattr(keep_pixels, "_room", lambda *_, **__: 50_000)
    monkeypatch.setattr(keep_pixels, "_estimate", lambda *_: 0)
    with pytest.raises(DoWithoutError, match="more than"):
        one.keep()
    assert [file.name for file in one.folder.iterdir()] == ["lock"]


def test_a_full_disk_is_told_and_leaves_nothing(split, monkeypatch):
    """/dev/full takes no byte, as a disk that is full."""
    one = split()
    monkeypatch.setattr(keep_pixels, "_estimate", lambda *_: 0)
    opened = Path.open
    to_full = lambda self, *a, **k: opened(Path("/dev/full") if self.suffix == ".pixels" else self, *a, **k)  # noqa: E731
    monkeypatch.setattr(Path, "open", to_full)
    with pytest.raises(DoWithoutError, match="No space left on device"):
        one.keep()
    assert [file.name for file in one.folder.iterdir()] == ["lock"]


def slow_build(one, monkeypatch, seconds):
    made = kept_pixels.Keeping.make
    monkeypatch.setattr(kept_pixels.Keeping, "make", lambda *a: time.sleep(seconds) or made(*a))
    process = get_context("fork").Process(target=one.keep)
    process.start()
    deadline = time.monotonic() + 120
    while not list(one.folder.glob("*.pixels")) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_a_build_that_is_killed_leaves_nothing_that_is_taken_for_whole(split, monkeypatch):
    one = split()
    process = slow_build(one, monkeypatch, 1.0)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    monkeypatch.undo()
    assert one.kept(monkeypatch)._kept is None
    assert one.keep() == NUM
    assert one.kept(monkeypatch)._kept is not None
    used = set(Index.read(one.file).pieces)
    assert {file.name for file in one.folder.glob("*.pixels")} == used


def test_a_build_that_is_killed_late_is_gone_on_with(split, monkeypatch):
    one = split()
    monkeypatch.setattr(keep_pixels, "SAVE_S", 0.0)
    process = slow_build(one, monkeypatch, 0.5)
    deadline = time.monotonic() + 120
    while not list(one.folder.glob("part-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    monkeypatch.undo()
    assert 0 < one.keep() < NUM
    assert one.keep() == 0


def test_of_two_that_build_at_once_one_waits_and_decodes_nothing(split, monkeypatch, capfd):
    one = split()
    process = slow_build(one, monkeypatch, 0.05)
    assert one.keep() == 0
    process.join()
    assert process.exitcode == 0
    assert "another run is keeping" in capfd.readouterr().err


def test_the_folder_in_shared_memory_has_to_be_ours(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(DoWithoutError, match="somebody else"):
        keep_pixels._own_folder(tmp_path / "link")
    keep_pixels._own_folder(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
