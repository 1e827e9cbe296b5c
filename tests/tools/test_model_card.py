"""The code of a model card, run as its reader would: what it sees of every kind of file is what validation sees."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from launcher.engine.checkpoints import checkpoint
from launcher.engine.model import build_model, build_preprocessing
from launcher.recipe import load as recipes
from launcher.recipe.schema import LaunchConfig, ModelConfig, PostConfig, Recipe
from launcher.recipe.schema_data import DataConfig
from launcher.report import build as report
from launcher.runs.run_dir import RunDir
from launcher.system.files import write_json_atomic
from launcher.tools import evaluate, export

pytestmark = pytest.mark.slow
CLASSES = ["ant", "bee", "cat", "dog"]
SIZE, RESIZED = 32, 40
PLAN = {"run_id": "card-1", "name": "card", "command": [], "created": 0.0, "backend": "local", "device": "cpu"}
PLAN |= {"nodes": 1, "procs_per_node": 1, "world_size": 1, "host": "here"}


def picture(height=60, width=90):
    """Smooth, of other colours in every corner: uint8 H x W x 3."""
    down, right = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return np.stack([255 * right, 255 * down, 200 * (1 - down) * right + 20], axis=2).round().astype("uint8")


def alpha(height=60, width=90):
    down, right = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return (255 * ((down - 0.5) ** 2 + (right - 0.5) ** 2 < 0.1)).astype("uint8")


def turned(orientation, name):
    def write(folder):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(picture()).save(folder / name, exif=exif, quality=95)

    return write


def transparent(mode, name, **options):
    def write(folder):
        image = Image.fromarray(picture())
        image.putalpha(Image.fromarray(alpha()))
        image.convert(mode).save(folder / name, **options)

    return write


def palette(folder):
    image = Image.fromarray(picture()).quantize(16)
    image.save(folder / "palette.png", transparency=bytes(range(0, 256, 16)))


def deep(name, kind, factor):
    def write(folder):
        Image.fromarray((picture()[..., 0].astype("float64") * factor).astype(kind)).save(folder / name)

    return write


FILES = {
    **{f"turned-{o}.jpg": turned(o, f"turned-{o}.jpg") for o in range(1, 9)},
    **{f"turned-{o}.png": turned(o, f"turned-{o}.png") for o in (3, 6)},
    "rgba.png": transparent("RGBA", "rgba.png"),
    "la.png": transparent("LA", "la.png"),
    "rgba.webp": transparent("RGBA", "rgba.webp", lossless=True),
    "rgba.tif": transparent("RGBA", "rgba.tif"),
    "palette.png": palette,
    "deep.png": deep("deep.png", "uint16", 257),
    "deep.tif": deep("deep.tif", "float32", 1 / 255),
    "cmyk.jpg": lambda folder: Image.fromarray(picture()).convert("CMYK").save(folder / "cmyk.jpg", quality=95),
    "grey.jpg": lambda folder: Image.fromarray(picture()).convert("L").save(folder / "grey.jpg", quality=95),
    "grey.png": lambda folder: Image.fromarray(picture()).convert("L").save(folder / "grey.png"),
    "narrow.png": lambda folder: Image.fromarray(picture(20, 2000)).save(folder / "narrow.png"),
    "tall.jpg": lambda folder: Image.fromarray(picture(900, 60)).save(folder / "tall.jpg", quality=95),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of an untrained network with its exports and its card."""
    photos = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        for number, name in enumerate(CLASSES):
            folder = photos / split / name
            folder.mkdir(parents=True)
            for kind, write in FILES.items():
                if hash_of(kind) % len(CLASSES) == number:
                    write(folder)
    recipe = Recipe(
        name="card",
        model=ModelConfig(arch="squeezenet1_1", weights=None),
        data=DataConfig(path=str(photos), image_size=SIZE, crop_pct=SIZE / RESIZED, background="#148082"),
        launch=LaunchConfig(device="cpu"),
        post=PostConfig(export=["onnx"], quantize=[]),
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


def run_card(run, photo):
    """Run the card's code on a photo, in a process that has nothing of ours; what it prints and what the model saw."""
    shutil.copy(photo, run.path / "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", run.model_card.read_text(), re.DOTALL)
    assert "launcher" not in code
    (run.path / "card.py").write_text(f"{code}\nnp.save('seen.npy', pixels)\n")
    done = subprocess.run([sys.executable, "-I", "card.py"], cwd=run.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), np.load(run.path / "seen.npy")


@pytest.mark.parametrize("name", FILES)
def test_the_cards_code_sees_and_answers_as_validation_does(name, run):
    best = evaluate.load_best(run)
    dataset = best.dataset("val")
    (index,) = [i for i, (path, _) in enumerate(dataset.samples) if path.endswith(f"/{name}")]
    answer, seen = run_card(run, dataset.samples[index][0])
    images, _ = next(best.batches("val", [index]))
    tolerance = 12 if name == "cmyk.jpg" else 3  # of 255: Pillow and libjpeg turn CMYK into RGB by other formulas
    std = min(best.preprocessing.std)
    assert np.abs(seen.transpose(2, 0, 1) - images[0].numpy()).max() <= tolerance / 255 / std
    with torch.inference_mode():
        assert answer == CLASSES[int(best.module(images).argmax())]


def test_the_manifest_and_the_card_say_what_is_done_in_words(run):
    import json

    facts = json.loads(run.export_manifest.read_text())["preprocessing"]
    assert (facts["background"], facts["orientation"], facts["grey_range"]) == ([20, 128, 130], "exif", None)
    card = run.model_card.read_text()
    assert facts["description"] in card
    for word in ("EXIF orientation", "#148082 where it is transparent", "16 bits"):
        assert word in card


def test_preprocessing_of_the_recipe_is_what_validation_reads_with(run):
    recipe = recipes.read_resolved(run.recipe)
    assert build_preprocessing(recipe.model, recipe.data) == evaluate.load_best(run).preprocessing
