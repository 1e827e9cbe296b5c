"""Temperature scaling: the temperature that logits were spoilt by is found again."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from launcher import cli
from launcher.recipe.schema_post import PostConfig
from launcher.runs.run_dir import RunDir
from launcher.tools import calibrate, score, trained_model
from tests.nets import FACTORY


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_logits_that_are_too_sure_or_too_unsure_are_mended(temperature, independent):
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(20_000, 5, generator=generator)
    if independent:
        targets = (torch.rand(honest.shape, generator=generator) < honest.sigmoid()).float()
    else:
        targets = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    logits = honest * temperature
    found = calibrate.fit(logits, targets, independent=independent)
    assert found == pytest.approx(temperature, rel=0.05)
    before, after = (calibrate.error_of(logits / by, targets, independent=independent) for by in (1.0, found))
    assert after < 0.02
    assert (before > 0.05) == (temperature != 1.0)


@pytest.mark.slow
def test_exports_and_predictions_have_the_temperature(launch, recipe_file, images, capsys):
    recipe = recipe_file(f"data: {{path: {images}}}\npost: {{calibrate: temperature, quantize: []}}\n")
    settings = [FACTORY, "data.image_size=32", "batch.size=5", "launch.device=cpu", "train.epochs=1"]
    settings.append("precision=fp32")  # in which exports are made
    done = launch(str(recipe), *settings, "--run-dir", "run")
    assert done.returncode == 0, done.stderr + done.stdout
    run = RunDir(launch.cwd / "run")
    assert "calibration error (ECE) was" in run.model_card.read_text()
    manifest = json.loads(run.export_manifest.read_text())
    temperature = manifest["calibration"]["temperature"]
    assert temperature != 1.0
    found = score.score(run)
    assert (found["temperature"], found["samples"]) == (temperature, 6)
    assert found["ece_calibrated"] == pytest.approx(manifest["calibration"]["ece_after"], abs=1e-6)
    assert found["ece"] == pytest.approx(manifest["calibration"]["ece_before"], abs=1e-6)
    assert cli.main(["evaluate", str(run)]) == 0
    assert re.search(rf"ECE, calibrated +{found['ece_calibrated']:.4f}", capsys.readouterr().out)
    pixels = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    onnx = trained_model.load(run.exports / "model.onnx")
    (run.exports / "model.onnx").unlink()
    for model in (onnx, trained_model.load(run.path)):
        logits = torch.from_numpy(model._logits(pixels))
        expected = (logits / temperature).softmax(1).numpy()
        assert model.probabilities(pixels) == pytest.approx(expected, abs=1e-5)


def test_without_images_the_temperature_of_the_checkpoints_earlier_exports_stays(tmp_path):
    run, told = RunDir(tmp_path), []
    run.exports.mkdir()
    earlier = {"temperature": 1.5, "images": 10}
    run.export_manifest.write_text(json.dumps({"checkpoint": {"step": 3}, "calibration": earlier}))
    post = PostConfig(calibrate="temperature")
    best = _Best(recipe=SimpleNamespace(post=post), state={"step": 3})
    made, found = calibrate.apply(run, best, "no images", told.append)
    assert (made.temperature, found) == (1.5, earlier)
    assert told == ["temperature 1.500, that of the earlier exports of this checkpoint: no images"]
    assert calibrate.apply(run, replace(best, state={"step": 4}), "no images", told.append)[1] is None


@dataclass(frozen=True)
class _Best:
    recipe: SimpleNamespace
    state: dict
    temperature: float = 1.0
