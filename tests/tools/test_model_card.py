"""The code of a model card, run as its reader would: what it sees of every kind of file is what validation sees."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import launcher
from launcher import cli
from launcher.engine.checkpoints import checkpoint
from launcher.engine.model import build_model, build_preprocessing
from launcher.recipe import load as recipes
from launcher.recipe.schema import LaunchConfig, ModelConfig, PostConfig, Recipe
from launcher.recipe.schema_data import DataConfig
from launcher.report import build as report
from launcher.runs.run_dir import RunDir
from launcher.system.files import write_json_atomic
from launcher.tools import evaluate, explain, export
from tests import odd_images
from tests.odd_images import FILES, tolerance

pytestmark = pytest.mark.slow
CLASSES = ["ant", "bee", "cat", "dog"]
SIZE, RESIZED = 32, 40
PLAN = {"run_id": "card-1", "name": "card", "command": [], "created": 0.0, "backend": "local", "device": "cpu"}
PLAN |= {"nodes": 1, "procs_per_node": 1, "world_size": 1, "host": "here"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of an untrained network with its exports and its card."""
    photos = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        for number, name in enumerate(CLASSES):
            folder = photos / split / name
            folder.mkdir(parents=True)
            for name_of_file, write in FILES.items():
                if hash_of(name_of_file) % len(CLASSES) == number:
                    write(folder / name_of_file)
    recipe = Recipe(
        name="card",
        model=ModelConfig(arch="squeezenet1_1", weights=None),
        data=DataConfig(path=str(photos), image_size=SIZE, crop_pct=SIZE / RESIZED, background="#148082"),
        launch=LaunchConfig(device="cpu"),
        post=PostConfig(export=["onnx"], quantize=[], bake_preprocessing=True),
    )
    made = RunDir(tmp_path_factory.mktemp("run"))
    made.create()
    write_json_atomic(made.plan, PLAN)
    made.recipe.write_text(recipes.to_yaml(recipe))
    torch.manual_seed(0)
    model = build_model(recipe, num_classes=len(CLASSES), image_size=SIZE, with_weights=False).module
    best = {"metric": "val/top1", "value": 0.5, "epoch": 0, "step": 3}
    state = {"step": 3, "classes": CLASSES, "early_stopping": {"best": best, "waited": 0}}
    written = checkpoint.write(made, checkpoint.Checkpoint(step=3, model=model.state_dict(), optimizer={}, state=state))
    made.best_checkpoint.symlink_to(written.name)
    export.export_run(made)
    report.write_report(made)
    return made


def hash_of(name):
    return sum(name.encode())


AS_A_READER = """
import json, shutil, sys
for name in ("torch", "torchvision", "launcher"):
    sys.modules[name] = None  # whoever imports it fails
code, answers, found = open("card.py").read(), {}, {}
for photo in sys.argv[1:]:
    shutil.copy(photo, "photo.jpg")
    found = {"print": lambda answer: answers.update({photo: answer})}
    exec(code, found)
    found["np"].save(f"{len(answers)}.npy", found["pixels"])
    answers[photo] = [answers[photo], found["logits"][0].tolist(), f"{len(answers)}.npy"]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def asked(run):
    """What each documented way of using a model says of each file: ``{way: {path: (class, probability)}}``.

    The card's code also leaves what the model saw.
    """
    best = evaluate.load_best(run)
    paths = [path for path, _ in best.dataset("val").samples]
    with torch.inference_mode():
        seen = torch.cat([images for images, _ in best.batches("val")])
        checkpoints = best.module(seen).softmax(dim=1)
    probabilities, answers = (found.tolist() for found in checkpoints.max(dim=1))
    (code,) = re.findall(r"```python\n(.*?)```", run.model_card.read_text(), re.DOTALL)
    assert "launcher" not in code
    (run.path / "card.py").write_text(code)
    card = [sys.executable, "-I", "-c", AS_A_READER, *paths]
    done = subprocess.run(card, cwd=run.path, capture_output=True, text=True, check=True)
    of_card = {
        path: (answer, softmax(logits), file) for path, (answer, logits, file) in json.loads(done.stdout).items()
    }
    command = [sys.executable, "-m", "launcher", "predict", str(run.path), *paths, "--json", "--top", "1"]
    said = [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]
    loaded = launcher.load(run.path).predict(paths)
    return {
        "validation": {path: (CLASSES[i], p) for path, i, p in zip(paths, answers, probabilities, strict=True)},
        "launch predict": {row["image"]: tuple(row["top"][0].values()) for row in said},
        "load().predict": {found.name: (found.label, found.probability) for found in loaded},
        "model.baked.onnx": {
            found.name: (found.label, found.probability)
            for found in launcher.load(run.exports / "model.baked.onnx").predict(paths)
        },
        "the card": {path: (answer, found.max()) for path, (answer, found, _) in of_card.items()},
        "seen by the card": {path: np.load(run.path / file) for path, (_, _, file) in of_card.items()},
        "seen by validation": dict(zip(paths, seen.numpy(), strict=True)),
        "std": min(best.preprocessing.std),
    }


def softmax(logits):
    parts = np.exp(np.array(logits) - max(logits))
    return parts / parts.sum()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", ["load().predict", "launch predict", "the card", "model.baked.onnx"])
def test_every_way_of_using_a_model_gives_the_answer_of_validation(way, name, asked):
    (path,) = [path for path in asked["validation"] if path.endswith(f"/{name}")]
    label, probability = asked[way][path]
    expected, expected_probability = asked["validation"][path]
    assert label == expected
    assert probability == pytest.approx(expected_probability, abs=0.002 if tolerance(name) else 1e-4)


@pytest.mark.parametrize("name", FILES)
def test_the_cards_code_sees_what_validation_sees(name, asked):
    (path,) = [path for path in asked["validation"] if path.endswith(f"/{name}")]
    seen = asked["seen by the card"][path].transpose(2, 0, 1)
    most = (max(tolerance(name), 1) + 0.01) / 255 / asked["std"]  # where a crop is rounded, one level more or less
    assert np.abs(seen - asked["seen by validation"][path]).max() <= most


def test_the_file_that_does_the_preprocessing_passed_the_same_gate(run):
    rows = {row["format"]: row for row in json.loads(run.export_manifest.read_text())["exports"]}
    assert (rows["onnx_baked"]["accepted"], rows["onnx_baked"]["agreement"]) == (True, 1.0)
    assert rows["onnx_baked"]["latency_p50_ms"] > 0
    assert rows["onnx_baked"]["peak_memory_mb"] > 0
    assert "model.baked.onnx" in run.model_card.read_text()


def test_the_manifest_and_the_card_say_what_is_done_in_words(run):
    facts = json.loads(run.export_manifest.read_text())["preprocessing"]
    assert (facts["background"], facts["orientation"], facts["grey_range"]) == ([20, 128, 130], "exif", None)
    card = run.model_card.read_text()
    assert facts["description"] in card
    for word in ("EXIF orientation", "#148082 where it is transparent", "16 bits"):
        assert word in card


def test_preprocessing_of_the_recipe_is_what_validation_reads_with(run):
    recipe = recipes.read_resolved(run.recipe)
    assert build_preprocessing(recipe.model, recipe.data) == evaluate.load_best(run).preprocessing


def test_where_the_model_looked_is_drawn_beside_what_it_saw(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("captum")
    paths = [str(path) for path in odd_images.write(tmp_path / "odd").values()][:3]
    (tmp_path / "odd" / "broken.jpg").write_bytes(b"no image")
    broken = str(tmp_path / "odd" / "broken.jpg")
    out = tmp_path / "drawn"
    assert cli.main(["predict", str(run.path), *paths, broken, paths[0], "--explain", "--out", str(out)]) == 0
    assert f"pictures of what the model looked at: {out}/" in capsys.readouterr().err
    names = [path.split("/")[-1].split(".")[0] for path in paths]
    names.append(f"{names[0]}-2")  # which came twice
    assert sorted(file.name for file in out.iterdir()) == sorted(f"{name}.explained.png" for name in names)
    with Image.open(out / f"{names[0]}.explained.png") as drawn:
        assert drawn.size == (2 * SIZE + explain.GAP, SIZE)
        left = np.asarray(drawn)[:, :SIZE]
    mean, std = (np.float32(v) for v in (launcher.load(run.path).facts["mean"], launcher.load(run.path).facts["std"]))
    seen = launcher.load(run.path).read(paths[0]).transpose(1, 2, 0) * std + mean
    assert np.abs(left / 255 - seen).max() <= 1 / 255
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert cli.main(["predict", str(run.path), paths[0], "--explain", "--out", str(out)]) == 2
    assert "pip install 'finetune-launcher[explain]'" in capsys.readouterr().err
