"""torchvision's data sets by name, from small local copies in the very formats that torchvision keeps them in."""

from __future__ import annotations

import struct
import threading

import numpy as np
import pytest
from PIL import Image

from launcher import cli
from launcher.errors import UsageError
from launcher.images import datasets
from launcher.images.listing import Listing
from launcher.images.source import Source


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_mnist(root, name="MNIST", nums=(20, 10)):
    """As its four files of big-endian arrays."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for prefix, num in (("train", nums[0]), ("t10k", nums[1])):
        images = np.arange(num * 28 * 28, dtype=np.uint64).reshape(num, 28, 28).astype(np.uint8)
        labels = (np.arange(num) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, num, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, num) + labels.tobytes())
    return root


def write_pets(root):
    """As its folder of photos, and two text files that say which is which."""
    for folder in ("images", "annotations"):
        (root / "oxford-iiit-pet" / folder).mkdir(parents=True)
    for split, num in (("trainval", 3), ("test", 2)):
        lines = []
        for label, breed in enumerate(("Abyssinian", "american_bulldog"), start=1):
            for number in range(num):
                name = f"{breed}_{split}{number}"
                Image.new("RGB", (40, 30), (label * 100, number, 0)).save(
                    root / "oxford-iiit-pet/images" / f"{name}.jpg"
                )
                lines.append(f"{name} {label} 1 1")
        (root / "oxford-iiit-pet/annotations" / f"{split}.txt").write_text("\n".join(lines))
    return root


def test_arrays_become_images_of_the_very_same_pixels(tmp_path):
    root = write_mnist(tmp_path / "raw")
    folder = datasets.prepare("MNIST", str(root))
    listing = Listing(Source(path=str(folder)))
    assert listing.classes[:2] == ["0 - zero", "1 - one"]
    assert [len(listing.samples(split)) for split in ("train", "val")] == [20, 10]
    path, label = listing.samples("train")[-1]
    assert label == 9
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image).flatten(), (np.arange(19 * 784, 20 * 784) % 256).astype(np.uint8))
    assert "validation is test" in next(listing.left_out())
    held = Listing(Source(path=str(folder), val_fraction=0.5))  # of train/; test/ is left for the end
    assert [len(held.samples(split)) for split in ("train", "val", "test")] == [10, 10, 10]


def test_images_that_are_files_become_links_to_them(tmp_path):
    root = write_pets(tmp_path / "raw")
    listing = Listing(Source(path=str(datasets.prepare("OxfordIIITPet", str(root)))))
    assert listing.classes == ["Abyssinian", "American Bulldog"]
    assert [len(listing.samples(split)) for split in ("train", "val")] == [6, 4]
    path, _ = listing.samples("train")[0]
    assert (tmp_path / "cache").as_posix() in path
    with Image.open(path) as image:
        assert image.filename == path
    assert datasets.Path(path).resolve().parent == root / "oxford-iiit-pet/images"


def test_of_many_processes_one_writes_it_and_the_others_wait(tmp_path, monkeypatch):
    root, calls = write_mnist(tmp_path / "raw"), []
    write = datasets.torchvision_sets.write

    def counted(*args, **kwargs):
        calls.append(1)
        write(*args, **kwargs)

    monkeypatch.setattr(datasets.torchvision_sets, "write", counted)
    threads = [threading.Thread(target=datasets.prepare, args=("MNIST", str(root))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [datasets.data_path("MNIST", str(root)).name]


def test_what_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(UsageError, match=r"CIFAR10 is not in .*as torchvision keeps it.*download=True"):
        datasets.prepare("CIFAR10", str(tmp_path))
    assert list((tmp_path / "cache").glob("*")) == []


def test_by_the_command_line_it_is_written_before_anything_is_started(tmp_path, recipe_file, capsys):
    recipe = recipe_file("model: {arch: shufflenet_v2_x0_5, weights: null}\nlaunch: {device: cpu}\n")
    keys = "data.name=CIFAR10", f"data.path={tmp_path}"
    assert cli.main([str(recipe), *keys, "--dry-run"]) == 0
    assert cli.main([str(recipe), *keys, "--run-dir", str(tmp_path / "run")]) == 2
    assert "data.name: CIFAR10 is not in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main([str(recipe), "data.name=cifar10", "--dry-run"]) == 2
    assert "CIFAR10" in capsys.readouterr().err
