"""`data.test`: measured once, by the best checkpoint, when training is over."""

from __future__ import annotations

import json
import shutil

import pytest

from launcher import cli
from launcher.runs.run_dir import RunDir
from tests.nets import FACTORY

SETTINGS = [
    *(FACTORY, "data.image_size=32", "batch.size=8", "launch.device=cpu", "post.enabled=false", "data.test=test"),
    *("data.workers=0", "optim.lr=0.05", "train.ema=0.5"),
    "precision=fp32",  # as evaluate computes; auto takes bf16 on some CPUs
]


def with_test(images, place):
    """The images, and a test set of nine of other pixels."""
    shutil.copytree(images, place)
    shutil.copytree(images / "train", place / "test")
    for file in sorted((place / "test").glob("*/*.png"))[::2]:
        file.unlink()
    return place


def lines(run, split):
    return [line for line in map(json.loads, run.metrics.read_text().splitlines()) if line["split"] == split]


@pytest.mark.slow
def test_it_is_measured_once_and_told_everywhere(warm_launch, recipe_file, images, tmp_path, monkeypatch, capsys):
    photos = with_test(images, tmp_path / "photos")
    recipe = recipe_file(f"data: {{path: {photos}}}\ntrain: {{epochs: 2}}\n")
    done = warm_launch(str(recipe), *SETTINGS, "--procs", "2", "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "9 of the validation and test images are training images too" in done.stderr
    monkeypatch.chdir(warm_launch.cwd)
    run = RunDir("run")
    best = run.read_status()["best"]
    (found,) = lines(run, "test")
    assert (found["samples"], found["step"], found["epoch"]) == (9, best["step"], best["epoch"])
    status = run.read_status()["test"]
    assert (status["split"], status["step"], status["samples"]) == ("test", best["step"], 9)
    assert status["top1"] == found["top1"]
    assert f"test  loss {found['loss']:.4f}" in done.stdout

    assert cli.main(["evaluate", "run", "--split", "test", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    for name in ("samples", "confusion", "per_class", "top1", "f1"):
        assert measured[name] == found[name], name
    assert measured["loss"] == pytest.approx(found["loss"], rel=1e-4)

    assert cli.main(["report", "run"]) == 0
    report = json.loads(run.report_json.read_text())
    assert report["test"]["values"]["top1"] == found["top1"]
    assert report["test"]["per_class"] == found["per_class"]
    assert report["best_val"]["samples"] == 6
    assert "<h2>Test set</h2>" in run.report_html.read_text()
    card = run.model_card.read_text()
    assert "on 9 images that had no part in training it or in choosing it" in card
    assert "there was no test set" not in card

    again = warm_launch("resume", "run")
    assert again.returncode == 0, again.stderr
    assert lines(run, "test") == [found]
    longer = warm_launch(str(recipe), *SETTINGS, "train.epochs=3", "--procs", "2", "--run-dir", "run", "--resume")
    assert longer.returncode == 0, longer.stderr
    assert len(lines(run, "val")) == 3
    measured_of = [line["step"] for line in lines(run, "test")]
    assert measured_of == sorted({best["step"], run.read_status()["best"]["step"]})

    shutil.copytree(photos / "val", photos / "holdout")
    settings = ["train.epochs=3", "data.test=holdout", "--procs", "2", "--run-dir", "run", "--resume"]
    other = warm_launch(str(recipe), *SETTINGS, *settings)
    assert other.returncode == 0, other.stderr
    assert (run.read_status()["state"], run.read_status()["test"]["split"]) == ("completed", "holdout")
    *_, last = lines(run, "test")
    assert (last["samples"], last["step"], last["test_set"]) == (6, run.read_status()["best"]["step"], "holdout")
    assert cli.main(["report", "run"]) == 0
    report = json.loads(run.report_json.read_text())["test"]
    assert (report["split"], report["samples"]) == ("holdout", 6)


def by_list(photos):
    rows = ["path,label,split"]
    for split in ("train", "val", "test"):
        rows += [
            f"{file.relative_to(photos)},{file.parent.name},{split}" for file in sorted(photos.glob(f"{split}/*/*.png"))
        ]
    (photos / "all.csv").write_text("\n".join([*rows, ""]))
    return photos / "all.csv"


def test_where_it_may_be_and_what_is_wrong(images, tmp_path, recipe_file, capsys):
    photos = with_test(images, tmp_path / "photos")
    file = by_list(photos)
    recipe = recipe_file("model: {arch: shufflenet_v2_x0_5, weights: null}\nlaunch: {device: cpu}\n")

    def dry_run(*overrides):
        code = cli.main([str(recipe), *overrides, "--dry-run"])
        shown = capsys.readouterr()
        return code, " ".join((shown.out + shown.err).split())

    shutil.copytree(photos / "test", photos / "holdout")
    for keys in (["test"], ["holdout"]):
        assert dry_run(f"data.path={photos}", *(f"data.test={key}" for key in keys))[0] == 0
    assert dry_run(f"data.path={file}", "data.test=test")[0] == 0
    for keys, said in (
        ([f"data.path={photos}", "data.test=other"], "data.test: "),
        ([f"data.path={photos}", "data.test=val"], "data.val and data.test are both val"),
        ([f"data.path={file}", "data.test=val"], "data.val and data.test are both val"),
    ):
        code, shown = dry_run(*keys)
        assert (code, said in shown) == (2, True), shown
    (photos / "holdout/cat").rename(photos / "holdout/owl")
    code, shown = dry_run(f"data.path={photos}", "data.test=holdout")
    assert (code, "'owl' in the test set (data.test) but not in training" in shown) == (2, True)
    shutil.rmtree(photos / "val")
    code, shown = dry_run(f"data.path={photos}", "data.test=test")  # which is not for validation then
    assert (code, "val" in shown) == (2, True)
    assert dry_run(f"data.path={photos}", "data.test=test", "data.val_fraction=0.3")[0] == 0
