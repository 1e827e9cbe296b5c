"""`data.channels: 1`: a model with one input, in training, exports, predictions and benchmarks alike."""

from __future__ import annotations

import json

import pytest

import launcher
from launcher import cli
from launcher.runs.run_dir import RunDir

SETTINGS = [
    *("model.arch=shufflenet_v2_x0_5", "data.image_size=32", "batch.size=8", "launch.device=cpu", "data.workers=0"),
    *("train.epochs=1", "post.export=[onnx, safetensors]", "post.quantize=[]", "data.channels=1", "data.rotate=10"),
    *("post.min_agreement=0",),
]


@pytest.mark.slow
def test_one_channel_from_training_to_predictions(warm_launch, recipe_file, images, tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    colour = recipe_file(f"data: {{path: {images}}}\nmodel: {{weights: null}}\n")
    first = warm_launch(str(colour), *SETTINGS, "data.channels=3", "post.enabled=false", "--debug", "--run-dir", "a")
    assert first.returncode == 0, first.stderr
    done = warm_launch(str(colour), *SETTINGS, "model.weights=./a", "--procs", "2", "--run-dir", "run")
    assert done.returncode == 0, done.stderr + done.stdout
    monkeypatch.chdir(warm_launch.cwd)
    run = RunDir("run")
    manifest = json.loads(run.export_manifest.read_text())
    assert {row["file"]: row["accepted"] for row in manifest["exports"]} == {
        "model.onnx": True,
        "model.safetensors": True,
    }
    assert (manifest["preprocessing"]["channels"], len(manifest["preprocessing"]["mean"])) == (1, 1)
    graph = onnx.load(run.exports / "model.onnx").graph
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim][1:] == [1, 32, 32]

    files = sorted(map(str, images.glob("val/*/*.png")))
    by_onnx = launcher.load(run.exports / "model.onnx").predict(files)
    assert cli.main(["evaluate", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (own,) = [line for line in map(json.loads, run.metrics.read_text().splitlines()) if line["split"] == "val"]
    assert found["confusion"] == own["confusion"]
    right = sum(one.label == file.split("/")[-2] for one, file in zip(by_onnx, files, strict=True))
    assert right == round(own["top1"] * own["samples"])
    card = run.model_card.read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('"photo.jpg"', repr(files[0]))
    monkeypatch.chdir(run.path)
    capsys.readouterr()
    exec(code, {})  # noqa: S102  as a reader of the card would
    assert capsys.readouterr().out.strip() == by_onnx[0].label
    monkeypatch.chdir(warm_launch.cwd)
    assert cli.main(["benchmark", "run", "--json"]) == 0
    (run.exports / "model.onnx").unlink()
    again = launcher.load("run").predict(files)
    assert [one.label for one in again] == [one.label for one in by_onnx]


def test_means_are_as_many_as_channels(recipe_file, images, capsys):
    recipe = recipe_file(f"data: {{path: {images}}}\nmodel: {{arch: shufflenet_v2_x0_5, weights: null}}\n")
    assert cli.main([str(recipe), "data.channels=1", "data.mean=[0.5, 0.4, 0.3]", "data.std=[0.2]", "--dry-run"]) == 2
    assert "data.mean: found 3 values; with data.channels: 1 give 1" in " ".join(capsys.readouterr().err.split())
    assert cli.main([str(recipe), "data.mean=[0.5]", "--dry-run"]) == 2
    assert "data.mean: found 1 value; with data.channels: 3 give 3" in " ".join(capsys.readouterr().err.split())
