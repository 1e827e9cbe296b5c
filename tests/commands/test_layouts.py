"""A training, `launch evaluate` and `launch predict` on layouts other than train/ and val/."""

from __future__ import annotations

import json
import shutil

import pytest

from launcher import cli
from launcher.runs.run_dir import RunDir
from tests.images.test_torchvision_sets import write_mnist
from tests.nets import FACTORY

SETTINGS = [
    *(FACTORY, "data.image_size=32", "batch.size=8", "train.epochs=1", "launch.device=cpu", "post.enabled=false"),
    *("data.workers=1", "optim.lr=0.05"),
]


def divided(images, tmp_path):
    """One folder of classes."""
    return [f"data.path={shutil.copytree(images / 'train', tmp_path / 'photos')}", "data.val_fraction=0.34"], 6


def listed(images, tmp_path):
    """A list beside the photos, one of which cannot be decoded."""
    photos = shutil.copytree(images / "train", tmp_path / "photos")
    (photos / "cat/0.png").write_bytes(b"")
    rows = [
        {
            "file": str(path.relative_to(photos)),
            "label": path.parent.name,
            "split": "val" if path.stem > "3" else "train",
        }
        for path in sorted(photos.glob("*/*.png"))
    ]
    file = photos / "all.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = photos / "names.txt"
    names.write_text("fox\ndog\ncat\n")
    keys = ["data.columns={path: file}", f"data.classes={names}", "data.on_bad_image=quarantine", "data.cache=disk"]
    return [f"data.path={file}", *keys], 6


def named(images, tmp_path):
    """A data set of torchvision's."""
    return ["data.name=MNIST", f"data.path={write_mnist(tmp_path / 'raw')}"], 10


def saved(images, tmp_path):
    """A data set of Hugging Face's, as its library saves it."""
    library = pytest.importorskip("datasets")
    names = [folder.name for folder in sorted((images / "train").iterdir())]
    kinds = library.Features({"image": library.Image(), "label": library.ClassLabel(names=names)})

    def rows(split):
        files = sorted((images / split).glob("*/*.png"))
        rows = [{"image": str(file), "label": names.index(file.parent.name)} for file in files]
        return library.Dataset.from_list(rows, features=kinds)

    library.DatasetDict({"train": rows("train"), "validation": rows("val")}).save_to_disk(tmp_path / "saved")
    return [f"data.path={tmp_path / 'saved'}"], 6


@pytest.mark.slow
@pytest.mark.parametrize("layout", [divided, listed, named, saved])
def test_a_run_is_trained_measured_and_asked(layout, warm_launch, recipe_file, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))
    keys, num_val = layout(images, tmp_path)
    how = ["--procs", "2"] if layout is listed else ["--debug"]
    done = warm_launch(str(recipe_file("{}\n")), *SETTINGS, *keys, *how, "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(warm_launch.cwd)
    run = RunDir("run")
    (own,) = [line for line in map(json.loads, run.metrics.read_text().splitlines()) if line["split"] == "val"]
    assert own["samples"] == num_val

    assert cli.main(["evaluate", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["confusion"]) == (own["samples"], own["confusion"])
    if layout is listed:
        assert list(found["per_class"]) == ["fox", "dog", "cat"]
        assert [image["path"] for image in json.loads(run.bad_images.read_text())["images"]] == ["cat/0.png"]
        assert "pixels_kept" in run.events.read_text()
    if layout is not named:
        for place, num in (
            (images / "val", 6),
            (write_csv(images, tmp_path, "file" if layout is listed else "path"), 2),
        ):
            assert cli.main(["evaluate", "run", "--data", str(place), "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["samples"] == num
        assert cli.main(["predict", "run", str(images / "val"), "--json"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 6


def write_csv(images, tmp_path, column):
    """Its columns are called as the run's own."""
    file = tmp_path / "others.csv"
    file.write_text(f"{column},label\n{images}/val/cat/0.png,cat\n{images}/val/dog/1.png,dog\n")
    return file
