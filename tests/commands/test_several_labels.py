"""Several classes an image, from the recipe to evaluate and predict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher import cli
from launcher.runs.run_dir import RunDir
from tests.nets import FACTORY

DATASET = f"{Path(__file__).parents[1] / 'several_labels.py'}:Photos"
SETTINGS = [FACTORY, "data.image_size=32", "batch.size=5", "launch.device=cpu", "train.epochs=1"]


def write_list(images, folder):
    """The same images in a list, where every fourth has no class and each a weight of its own."""
    shutil.copytree(images, folder)
    rows = ["path,label,split,weight"]
    for number, file in enumerate(sorted(folder.glob("*/*/*.png"))):
        label = "" if number % 4 == 3 else f"{file.parent.name};early" if number % 2 else file.parent.name
        rows.append(f"{file.relative_to(folder)},{label},{file.parent.parent.name},{1 + number % 3}")
    (folder / "list.csv").write_text("\n".join([*rows, ""]))
    return folder / "list.csv"


@pytest.mark.slow
@pytest.mark.parametrize("listed", [False, True], ids=["own data set", "list"])
def test_a_run_is_measured_and_predicts_all_classes_above_the_threshold(
    warm_launch, recipe_file, images, tmp_path, monkeypatch, capsys, listed
):
    where = f"path: {write_list(images, tmp_path / 'photos')}" if listed else f"path: {images}, dataset: '{DATASET}'"
    recipe = recipe_file(
        f"data: {{{where}, task: multi_label, threshold: 0.3, balance: weights}}\n"
        "train: {loss: binary_cross_entropy, early_stopping: {metric: val/average_precision, mode: max}}\n"
    )
    done = warm_launch(str(recipe), *SETTINGS, "--procs", "2", "--run-dir", "run")
    assert done.returncode == 0, done.stderr + done.stdout
    assert ("the loss of each counts by its weight in the list" in done.stdout) == listed
    monkeypatch.chdir(warm_launch.cwd)
    run = RunDir("run")
    (own,) = [line for line in map(json.loads, run.metrics.read_text().splitlines()) if line["split"] == "val"]
    assert run.read_status()["best"]["metric"] == "val/average_precision"
    check_what_the_report_shows(run, own)

    assert cli.main(["evaluate", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("samples", "top1", "f1", "f1_micro", "average_precision", "per_class"):
        assert found[name] == own[name], name
    assert cli.main(["evaluate", "run"]) == 0
    assert "average precision (mAP)" in capsys.readouterr().out

    assert cli.main(["predict", "run", "--json", str(images / "val")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == own["samples"]
    assert all(each["probability"] >= 0.3 for row in rows for each in row["top"])
    assert max(len(row["top"]) for row in rows) > 1


def check_what_the_report_shows(run, own):
    """validation.json and the first training images are there, with all classes of each image."""
    kept = json.loads(run.validation.read_text())
    assert kept["samples"] == own["samples"]
    assert {name: row["val"] for name, row in kept["classes"].items()} == {
        name: row["samples"] for name, row in own["per_class"].items()
    }
    assert sum(images for images, _, _ in kept["calibration"]) == own["samples"] * len(kept["classes"])
    assert len(kept["wrong"]) + len(kept["right"]) == own["samples"] <= 12
    answers = {row["image"]: row["predicted"] for row in [*kept["wrong"], *kept["right"]]}
    assert {row["image"]: row["predicted"] for row in own["examples"]} == answers
    for row in [*kept["wrong"], *kept["right"]]:
        assert set(row["true"]) <= set(kept["classes"])
        assert (row["true"] == row["predicted"]) == (row in kept["right"])
    batch = json.loads(run.sample_batch.read_text())["images"]
    is_own = "dataset: null" not in run.recipe.read_text()
    assert len(batch) == (5 if is_own else 12)  # of an own data set none but those of the first batch
    assert all(row["picture"].startswith("data:image/jpeg") and isinstance(row["class"], list) for row in batch)
    page = run.report_html.read_text()
    assert is_own or "none of the classes" in page
    assert "Training images as the model sees them" in page
    assert page.count("<img") == len(batch) + own["samples"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.dataset=null"], "folders give an image one class"),
        (["train.loss=cross_entropy"], "found cross_entropy, which chooses one class an image"),
        (["data.balance=sampler"], "use weights or none"),
    ],
)
def test_what_does_not_go_with_it_is_said(changes, said, recipe_file, images, capsys):
    recipe = recipe_file(
        f"data: {{path: {images}, dataset: '{DATASET}', task: multi_label}}\ntrain: {{loss: binary_cross_entropy}}\n"
    )
    assert cli.main([str(recipe), *SETTINGS, *changes, "--dry-run"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
