"""A run that began with the weights of another one goes on when these are gone: its checkpoints have its own."""

from __future__ import annotations

import json
import shutil

import pytest

from launcher import cli
from launcher.engine.network.fitting import are_gone
from launcher.recipe import load as recipes
from launcher.runs.run_dir import RunDir

SETTINGS = [
    *("data.image_size=32", "batch.size=8", "launch.device=cpu", "post.enabled=false", "data.workers=0"),
    *("train.batchnorm_recompute=0", "tracking.wandb.mode=disabled"),
]


@pytest.mark.slow
def test_a_resume_needs_no_starting_weights(warm_launch, recipe_file, images, monkeypatch, capsys):
    recipe = recipe_file(
        f"model: {{arch: shufflenet_v2_x0_5, weights: null}}\ndata: {{path: {images}}}\ntrain: {{epochs: 1}}\n"
    )
    monkeypatch.chdir(warm_launch.cwd)
    first = warm_launch(str(recipe), *SETTINGS, "--run-dir", "a")
    assert first.returncode == 0, first.stderr
    done = warm_launch(str(recipe), *SETTINGS, "model.weights=./a", "--run-dir", "b")
    assert done.returncode == 0, done.stderr
    shutil.rmtree("a")
    assert cli.main([str(recipe), *SETTINGS, "model.weights=./a", "--run-dir", "c"]) == 2
    assert "no such file" in capsys.readouterr().err
    for number, how in enumerate(
        (["resume", "b"], [str(recipe), *SETTINGS, "model.weights=./a", "--run-dir", "b", "--resume"])
    ):
        again = warm_launch(*how, f"train.epochs={number + 2}")
        assert again.returncode == 0, again.stderr + again.stdout
    lines = [json.loads(line) for line in RunDir("b").metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["split"] == "val"] == [0, 1, 2]
    for checkpoint in RunDir("b").checkpoints.glob("step-*"):
        (checkpoint / "model.safetensors").write_bytes(b"")
    lost = warm_launch("resume", "b", "train.epochs=4")
    assert lost.returncode == 1
    assert "no checkpoint of" in lost.stdout + lost.stderr


def test_weights_of_torchvisions_that_are_not_in_the_cache_are_gone(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = recipes.from_dict({"model": {"arch": "resnet18", "weights": "DEFAULT"}}).model
    assert are_gone(model)
    place = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    place.parent.mkdir(parents=True)
    place.touch()
    assert not are_gone(model)
    assert not are_gone(recipes.from_dict({"model": {"weights": None}}).model)
