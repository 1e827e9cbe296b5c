"""`launch evaluate` gives the very numbers of the run's own validation, and those of other labelled images."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from launcher import cli
from launcher.engine import device
from launcher.runs.run_dir import RunDir
from launcher.tools import evaluate as tools
from tests.nets import FACTORY

SETTINGS = [
    *(FACTORY, "data.image_size=32", "batch.size=5", "train.epochs=2", "launch.device=cpu", "post.enabled=false"),
    "precision=bf16",  # on any CPU, if slowly
]


def mean_of_both_ways(run):
    """The loss of the mean of each image's logits and its mirror image's, by hand."""
    from launcher.tools.evaluate import load_best

    best = load_best(run)
    ((images, labels),) = best.batches("val")
    with torch.inference_mode():
        logits = torch.stack([best.module(images), best.module(images.flip(3))]).mean(0)
    return float(torch.nn.functional.cross_entropy(logits, labels))


def of_a_gpu(best):
    """As if the run had computed on one."""
    return replace(best, state=best.state | {"device": "cuda"})


def a_list_says_what_its_columns_are(evaluate, folder, of_folder):
    odd = folder.with_suffix(".csv")
    rows = [f"{file},{file.parent.name},train" for file in sorted(folder.glob("*/*"))]
    odd.write_text("\n".join(["file,kind,split", *rows]))
    code, shown = evaluate("--data", odd, "--json")
    (columns,) = re.findall(r"'(data.columns=.*?)'", shown.err)
    assert code == 2
    found = json.loads(evaluate("--data", odd, columns, "--json")[1].out)
    assert [found[name] for name in ("samples", "per_class")] == [of_folder[name] for name in ("samples", "per_class")]
    _, shown = evaluate(columns)
    assert "only data.columns of a list that --data names may be another" in shown.err


@pytest.mark.slow
def test_the_best_checkpoint_is_measured_on_its_own_images_and_on_others(
    warm_launch, recipe_file, images, tmp_path, monkeypatch, capsys
):
    own = "{metric: torchmetrics.classification:MulticlassAccuracy, name: accuracy, args: {num_classes: auto}}"
    recipe = recipe_file(f"data: {{path: {images}}}\nmetrics: [{own}]\n")
    done = warm_launch(recipe, *SETTINGS, "--procs", "2", "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(warm_launch.cwd)
    run = RunDir("run")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    best = run.read_status()["best"]
    (own,) = [line for line in lines if line["split"] == "val" and line["step"] == best["step"]]

    def evaluate(*arguments):
        code = cli.main(["evaluate", "run", *map(str, arguments)])
        return code, capsys.readouterr()

    monkeypatch.setattr(device, "cpu_has_bf16_units", lambda: False)
    code, shown = evaluate("--json")
    found = json.loads(shown.out)
    assert code == 0
    for name in ("samples", "top1", "top5", "f1", "auroc", "ece", "accuracy", "per_class", "confusion"):
        assert found[name] == own[name], name
    assert found["loss"] == pytest.approx(own["loss"], rel=1e-12)  # one sum instead of one of each rank's
    assert (found["computed_in"], found["differs"]) == ("bf16", None)
    low, high = found["intervals"]["auroc"]
    assert 0 <= low <= found["auroc"] <= high <= 1

    load = tools.load_best
    monkeypatch.setattr(tools, "load_best", lambda run: of_a_gpu(load(run)))
    found = json.loads(evaluate("--json")[1].out)
    not_alike = "in fp32 instead of bf16, on the CPU instead of a GPU"
    assert (found["computed_in"], found["differs"]) == ("fp32", not_alike)
    assert found["loss"] == pytest.approx(own["loss"], rel=0.01)
    assert found["loss"] != pytest.approx(own["loss"], rel=1e-5)

    mirrored = json.loads(evaluate("--tta", "--json")[1].out)
    assert mirrored["loss"] == pytest.approx(mean_of_both_ways(run), rel=1e-4)
    assert mirrored["loss"] != pytest.approx(own["loss"], rel=1e-6)

    code, shown = evaluate()
    assert "6 images of" in shown.out
    assert f"{not_alike}: the run's own figures may differ by rounding" in shown.out
    assert re.search(rf"top-1 +{own['top1']:.4f}  \(95 % interval", shown.out)
    assert "top-5" not in shown.out  # three classes

    other = shutil.copytree(images / "val", tmp_path / "other")
    shutil.rmtree(other / "cat")
    found = json.loads(evaluate("--data", other, "--json")[1].out)
    assert found["samples"] == 4
    assert found["per_class"]["cat"]["samples"] == 0
    assert found["per_class"]["dog"]["recall"] == own["per_class"]["dog"]["recall"]

    a_list_says_what_its_columns_are(evaluate, other, found)

    (other / "horse").mkdir()
    code, shown = evaluate("--data", other)
    assert (code, shown.out) == (2, "")
    assert f"--data {other}: holds 'horse', which is no class of the model" in shown.err
    code, shown = evaluate("--data", images)
    assert f"name one of its splits: --data {images / 'val'}" in shown.err
    _, shown = evaluate("--split", "test")
    assert "labelled images elsewhere: launch evaluate run --data FOLDER" in shown.err
