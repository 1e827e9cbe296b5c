"""Exports of a real run: what they say, and that they are refused where they should be."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import launcher
from launcher import cli
from launcher.engine.checkpoints import checkpoint
from launcher.engine.device import num_cores
from launcher.errors import UsageError
from launcher.recipe import load as recipes
from launcher.recipe.schema import LaunchConfig, ModelConfig, PostConfig, Recipe
from launcher.recipe.schema_data import DataConfig
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.system import cpu as host_cpu
from launcher.system.files import write_json_atomic
from launcher.tools import evaluate, export, onnx_model, quantize
from launcher.tools.gate import rejection

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
PLAN = {
    "run_id": "made-1",
    "name": "made",
    "command": [],
    "created": 0.0,
    "backend": "local",
    "device": "cpu",
    "nodes": 1,
    "procs_per_node": 1,
    "world_size": 1,
    "host": "here",
}
CALIBRATED = {"activation_bits": 8, "calibration_images": 96}
CLASSES = ["ant", "bee", "cat", "dog"]
SIZE = 32


def write_photos(folder: Path) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, num in (("train", 24), ("val", 10)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(num):
                pixels = np.clip(rng.normal(60 * label + 30, 40, (SIZE, SIZE, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def make_run(folder: Path, photos: Path, *, arch: str, post: PostConfig, image_size: int = SIZE) -> RunDir:
    """A run directory with a best checkpoint of new weights whose BatchNorm has seen images of its size."""
    recipe = Recipe(
        name="made",
        model=ModelConfig(arch=arch, weights=None),
        data=DataConfig(path=str(photos), image_size=image_size, crop_pct=1.0, augment="none"),
        launch=LaunchConfig(device="cpu"),
        post=post,
    )
    run = RunDir(folder)
    run.create()
    write_json_atomic(run.plan, PLAN)
    run.recipe.write_text(recipes.to_yaml(recipe))
    from launcher.engine.model import build_model, build_preprocessing

    model = build_model(recipe, num_classes=len(CLASSES), image_size=image_size, with_weights=False).module
    preprocessing = build_preprocessing(recipe.model, recipe.data)
    assert preprocessing.image_size == image_size
    with torch.no_grad():
        model.train()
        model(torch.randn(8, 3, image_size, image_size))
    best = {"metric": "val/top1", "value": 0.5, "epoch": 0, "step": 3}
    state = {"step": 3, "classes": CLASSES, "early_stopping": {"best": best, "waited": 0}}
    written = checkpoint.write(run, checkpoint.Checkpoint(step=3, model=model.state_dict(), optimizer={}, state=state))
    run.best_checkpoint.symlink_to(written.name)
    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, photos) -> RunDir:
    post = PostConfig(export=["onnx", "torchscript"], quantize=["onnx_int8"], max_top1_drop=100.0, min_agreement=0.0)
    run = make_run(tmp_path_factory.mktemp("run"), photos, arch="resnet18", post=post)
    export.export_run(run)
    return run


def manifest(run: RunDir) -> dict:
    return json.loads(run.export_manifest.read_text())


def test_the_manifest_has_what_the_contract_names(exported):
    found = manifest(exported)
    assert found["run_id"] == "made-1"
    assert found["checkpoint"] == {"epoch": 0, "step": 3, "metric": "val/top1", "value": 0.5}
    assert found["classes"] == CLASSES
    assert found["val_samples"] == 40
    assert found["preprocessing"]["image_size"] == SIZE
    times = {"latency_p50_ms", "latency_p95_ms", "latency_iqr_ms"}
    assert set(found["reference"]) == {"format", "top1", "size_mb", *times}
    assert found["cpu"]["saturates_int8"] == host_cpu.saturates_int8()
    rows = {row["format"]: row for row in found["exports"]}
    assert {name: row["file"] for name, row in rows.items()} == export.FILES
    for row in rows.values():
        assert row["top1_drop"] == pytest.approx(100 * (found["reference"]["top1"] - row["top1"]))
        assert 0 < row["latency_p50_ms"] <= row["latency_p95_ms"]
    assert rows["onnx"]["agreement"] == rows["torchscript"]["agreement"] == 1.0
    for name in ("onnx", "torchscript"):
        assert (rows[name]["num_changed"], rows[name]["quantization"]) == (0, None)
    int8 = rows["onnx_int8"]
    assert int8["num_changed"] == round(40 * (1 - int8["agreement"]))
    assert int8["quantization"] == {
        "target": "portable",
        "weight_bits": 7,
        "float_layers": [],
        "tried": [{"float_layers": 0, "reason": None}],
        **CALIBRATED,
    }
    assert rows["onnx_int8"]["size_mb"] < 0.3 * rows["onnx"]["size_mb"]
    told = {event["file"]: event for event in events(exported, "export")}
    for row in rows.values():
        assert told[row["file"]].items() >= {key: row[key] for key in ("top1", "agreement", "accepted")}.items()


def test_the_onnx_file_takes_any_batch_and_computes_what_the_checkpoint_does(exported):
    session = onnxruntime.InferenceSession(exported.exports / "model.onnx")
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    module = evaluate.load_best(exported).module
    for batch in (1, 7):
        images = torch.randn(batch, 3, SIZE, SIZE)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), module(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("file", ["model.onnx", "model.int8.onnx"])
def test_the_file_alone_says_its_classes_and_preprocessing(exported, file):
    found = {
        p.key: json.loads(p.value)
        for p in onnx.load(exported.exports / file).metadata_props
        if p.key in "classes preprocessing"
    }
    assert found["classes"] == CLASSES
    assert found["preprocessing"] == manifest(exported)["preprocessing"]


def test_nothing_half_made_is_left(exported):
    assert sorted(p.name for p in exported.exports.iterdir()) == ["manifest.json", *sorted(export.FILES.values())]


SAME = {"top1_drop": 0.0, "agreement": 1.0, "num_changed": 0}


def test_an_int8_model_that_loses_too_much_is_not_accepted_and_says_why():
    row = SAME | {"top1_drop": 1.2}
    assert rejection(row, PostConfig(), num=500, is_quantized=True) == (
        "loses 1.20 points of top-1; post.max_top1_drop allows 1"
    )
    assert rejection(row | {"top1_drop": 1.0}, PostConfig(), num=500, is_quantized=True) is None


def test_mistakes_that_come_and_go_in_equal_numbers_are_no_agreement():
    row = SAME | {"agreement": 124 / 141, "num_changed": 17}
    assert rejection(row, PostConfig(), num=141, is_quantized=True) == (
        "agrees with the checkpoint on 87.94% of the images (17 of 141 answers changed); "
        "post.min_agreement asks for 97%"
    )
    assert rejection(row, PostConfig(min_agreement=0.87), num=141, is_quantized=True) is None
    assert "asks for 87.95%" in rejection(row, PostConfig(min_agreement=0.8795), num=141, is_quantized=True)


@pytest.mark.parametrize("least", [0.0, 0.97, 1.0])
def test_an_agreement_of_just_what_is_asked_for_is_enough(least):
    row = SAME | {"agreement": (least * 100) / 100, "num_changed": 3}
    assert rejection(row, PostConfig(min_agreement=least), num=100, is_quantized=True) is None


def test_all_that_is_wrong_with_an_export_is_said():
    row = SAME | {"top1_drop": 40.0, "agreement": 0.5, "num_changed": 50}
    reason = rejection(row, PostConfig(), num=100, is_quantized=True)
    assert "loses 40.00 points" in reason
    assert "50 of 100 answers changed" in reason


def test_a_float_export_that_sees_other_things_is_never_accepted():
    row = SAME | {"agreement": 0.98, "num_changed": 2}
    reason = rejection(row, PostConfig(min_agreement=0.5), num=100, is_quantized=False)
    assert "agrees with the checkpoint on 98.00%" in reason
    assert "a float32 export asks for 99%" in reason
    assert "post.min_agreement asks for 100%" in rejection(
        row, PostConfig(min_agreement=1.0), num=100, is_quantized=False
    )


def test_a_broken_quantization_is_measured_and_refused(tmp_path, photos, monkeypatch):
    post = PostConfig(export=["onnx"], quantize=["onnx_int8"], max_top1_drop=0.0)
    run = make_run(tmp_path / "run", photos, arch="resnet18", post=post)
    monkeypatch.setattr(export, "quantize_onnx", lambda source, target, best, judge: _zero_weights(source, target))
    monkeypatch.setattr(evaluate, "predict", _with_true_labels_of_the_checkpoint(evaluate.predict))
    export.export_run(run)
    rows = {row["format"]: row for row in manifest(run)["exports"]}
    assert rows["onnx"]["accepted"]
    assert not rows["onnx_int8"]["accepted"]
    assert "points of top-1" in rows["onnx_int8"]["reason"]


def _zero_weights(source: Path, target: Path) -> None:
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    onnx.save(model, target)


def _with_true_labels_of_the_checkpoint(predict):
    """The checkpoint of new weights is right about everything, so that a loss can be seen."""

    def _predict(predictors, best):
        predicted, _ = predict(predictors, best)
        return predicted, predicted["pytorch"]

    return _predict


def test_calibration_images_are_the_same_every_time(exported, monkeypatch):
    seen = []
    best = evaluate.load_best(exported)
    original = evaluate.BestModel.batches

    def spy(self, split, indices=None):
        seen.append((split, tuple(indices)))
        return original(self, split, indices)

    monkeypatch.setattr(evaluate.BestModel, "batches", spy)
    target = exported.path / "again.onnx"
    for _ in range(2):
        quantize.quantize_onnx(exported.exports / "model.onnx", target, best, lambda path: None)
    target.unlink()
    assert seen[0] == seen[1]
    assert seen[0][0] == "train"
    assert sorted(seen[0][1]) == list(range(96))


def test_without_a_best_checkpoint_it_says_so(exported, tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    shutil.copy(exported.recipe, run.recipe)
    with pytest.raises(UsageError, match="no best checkpoint yet"):
        export.export_run(run)
    assert not run.exports.exists()


def test_a_damaged_checkpoint_is_refused(exported, tmp_path):
    copied = RunDir(shutil.copytree(exported.path, tmp_path / "run", symlinks=True))
    weights = copied.best_checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    before = copied.export_manifest.stat().st_mtime_ns
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors: damaged"):
        export.export_run(copied)
    assert copied.export_manifest.stat().st_mtime_ns == before


def test_auxiliary_heads_do_not_reach_the_export(tmp_path, photos):
    post = PostConfig(export=["onnx"], quantize=[])
    run = make_run(tmp_path / "run", photos, arch="googlenet", post=post, image_size=64)
    export.export_run(run)
    session = onnxruntime.InferenceSession(run.exports / "model.onnx")
    assert [(o.name, o.shape[1]) for o in session.get_outputs()] == [("logits", len(CLASSES))]
    assert manifest(run)["exports"][0]["agreement"] == 1.0


def test_launch_export_makes_it_all_again(exported, tmp_path):
    copied = RunDir(shutil.copytree(exported.path, tmp_path / "run", symlinks=True))
    copied.export_manifest.unlink()
    (copied.exports / "model.onnx").write_bytes(b"old")
    time.sleep(0.01)
    recipe = recipes.read_resolved(copied.recipe)
    smaller = dataclasses.replace(recipe, post=dataclasses.replace(recipe.post, export=["onnx"], quantize=[]))
    copied.recipe.write_text(recipes.to_yaml(smaller))
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "export", str(copied.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "model.onnx" in done.stdout
    assert done.stderr == ""
    assert manifest(copied)["exports"][0]["agreement"] == 1.0
    assert copied.report_json.is_file()


# A run directory that was copied, or whose images were moved


@pytest.fixture
def moved(exported, photos, tmp_path):
    """A copy of the run whose recipe names a folder that is not there any more, and where its images are now."""
    run = RunDir(shutil.copytree(exported.path, tmp_path / "run", symlinks=True))
    recipe = recipes.read_resolved(run.recipe)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=str(tmp_path / "gone")))
    post = dataclasses.replace(recipe.post, export=["onnx"])
    run.recipe.write_text(recipes.to_yaml(dataclasses.replace(recipe, post=post)))
    return run, photos


def test_without_images_an_export_is_made_and_called_not_measured(moved, capfd):
    run, _ = moved
    shutil.rmtree(run.exports)
    assert cli.main(["export", str(run.path)]) == 0
    gone = run.path.parent / "gone/val"
    why = f"not measured: no images at {gone}"
    said = capfd.readouterr().out
    assert f"{why}; where they are now: launch export {run} data.path=FOLDER" in said
    assert "model.int8.onnx: not made: calibration needs training images: no images at " in said
    assert f"NOT ACCEPTED: {why}" in said
    found = manifest(run)
    (row,) = found["exports"]
    assert (row["format"], row["top1"], row["agreement"], row["top1_drop"]) == ("onnx", None, None, None)
    assert (row["accepted"], row["reason"], found["val_samples"]) == (False, why, 0)
    assert found["not_measured"] == f"no images at {gone}"
    assert [each["format"] for each in found["not_made"]] == ["onnx_int8"]
    assert sorted(file.name for file in run.exports.iterdir()) == ["manifest.json", "model.onnx"]
    assert events(run, "export")[-1]["reason"] == why
    assert "not measured" in run.report_html.read_text()
    assert "| - | - | - |" in run.model_card.read_text()
    assert cli.main(["report", str(run.path)]) == 0


def test_what_was_measured_of_the_same_checkpoint_stays(moved):
    run, _ = moved
    before = {row["format"]: row for row in manifest(run)["exports"]}
    export.export_run(run)
    rows = {row["format"]: row for row in manifest(run)["exports"]}
    assert rows["onnx_int8"] == before["onnx_int8"]
    assert rows["onnx"]["accepted"] is False
    assert manifest(run)["not_made"] == []
    changed = manifest(run) | {"checkpoint": {"step": 1}}
    run.export_manifest.write_text(json.dumps(changed))
    export.export_run(run)
    assert [row["format"] for row in manifest(run)["exports"]] == ["onnx"]
    assert not (run.exports / "model.int8.onnx").exists()


def test_images_that_were_moved_are_named_on_the_command_line(moved, capsys):
    run, photos = moved
    before = run.recipe.read_bytes()
    assert cli.main(["export", str(run.path), f"data.path={photos}"]) == 0
    found = manifest(run)
    assert (found["val_samples"], found["not_measured"], found["not_made"]) == (40, None, [])
    assert {row["format"] for row in found["exports"] if row["top1"] is not None} == {"onnx", "onnx_int8"}
    assert run.recipe.read_bytes() == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.path={tmp}", "data.path={tmp}: no images at {tmp}/val"),
        ("data.path={tmp}/other", "{tmp}/other/val: holds classes that the model does not know, as 'emu'"),
        ("data.path=", "only data.path=FOLDER can change"),
        ("model.arch=resnet50", "only data.path=FOLDER can change"),
    ],
)
def test_a_wrong_folder_is_refused_before_anything_is_made(moved, tmp_path, capsys, override, words):
    run, _ = moved
    (tmp_path / "other/val/emu").mkdir(parents=True)
    before = {file: file.stat().st_mtime_ns for file in run.exports.iterdir()}
    assert cli.main(["export", str(run.path), override.format(tmp=tmp_path)]) == 2
    assert words.format(tmp=tmp_path) in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in run.exports.iterdir()} == before


@pytest.mark.parametrize("copied", ["without links", "links followed"])
def test_a_copy_without_links_knows_its_best_checkpoint(photos, tmp_path, copied):
    original = make_run(tmp_path / "original", photos, arch="squeezenet1_1", post=PostConfig(export=[], quantize=[]))
    run = RunDir(shutil.copytree(original.path, tmp_path / "run"))  # follows links
    if copied == "without links":
        shutil.rmtree(run.best_checkpoint)
    run.update_status(best={"metric": "val/top1", "value": 0.5, "epoch": 0, "step": 3})
    assert evaluate.load_best(run).state["step"] == 3
    checkpoint._point(run.best_checkpoint, run.checkpoint(3))
    assert run.best_checkpoint.is_symlink()
    assert evaluate.load_best(run).folder.name == "step-00000003"


@pytest.mark.parametrize(
    ("threads", "environment", "expected"), [("auto", "1", 1), (1, "2", 1), (2, None, 2), ("auto", "all", None)]
)
def test_threads_are_what_the_recipe_or_the_environment_says(monkeypatch, threads, environment, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    assert export.num_threads(LaunchConfig(threads=threads)) == (expected or num_cores())


def test_what_libraries_print_goes_to_the_log_and_our_lines_to_the_terminal(tmp_path, capfd):
    log = tmp_path / "logs" / "post.log"
    with contextlib.suppress(ValueError), export._noise_to(log) as say:
        os.write(1, b"printed\n")
        say("making model.onnx")
        os.system("echo C library >&2")  # noqa: S605
        os.write(2, b"TorchScript is deprecated\n")
        raise ValueError
    print("after")
    assert capfd.readouterr() == ("making model.onnx\nafter\n", "")
    assert {"printed", "C library", "TorchScript is deprecated"} <= {*log.read_text().splitlines()}


def test_first_layers_stay_in_float_until_the_int8_model_is_accepted(exported, tmp_path):
    verdicts, float_before = iter(["too bad", "still too bad", None]), []

    def judge(path):
        model = onnx.load(path)
        quantized = {
            output for node in model.graph.node if node.op_type == "DequantizeLinear" for output in node.output
        }
        convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
        float_before.append([node.name for node in convolutions if node.input[1] not in quantized])
        return next(verdicts)

    target = tmp_path / "model.int8.onnx"
    quantize.quantize_onnx(exported.exports / "model.onnx", target, evaluate.load_best(exported), judge)
    made = onnx_model.read_quantization(target)
    assert [len(names) for names in float_before] == [0, 5, 12]
    assert set(made["float_layers"]) == set(float_before[-1])
    assert set(float_before[1]) < set(float_before[2])
    assert made["tried"] == [
        {"float_layers": 0, "reason": "too bad"},
        {"float_layers": 5, "reason": "still too bad"},
        {"float_layers": 12, "reason": None},
    ]


# --- using it


def test_a_loaded_run_gives_the_checkpoints_own_answers_by_its_onnx_file_and_without_it(exported, tmp_path):
    best = evaluate.load_best(exported)
    paths = [path for path, _ in best.dataset("val").samples]
    with torch.inference_mode():
        logits = torch.cat([best.module(images) for images, _ in best.batches("val")])
    expected = logits.softmax(dim=1).max(dim=1)
    bare = shutil.copytree(exported.path, tmp_path / "bare", symlinks=True)
    shutil.rmtree(bare / "exports")
    for place, file in ((exported.path, exported.exports / "model.onnx"), (bare, bare / "checkpoints")):
        model = launcher.load(place)
        assert str(model.file).startswith(str(file))
        found = model.predict(paths, top=1)
        assert [one.label for one in found] == [CLASSES[index] for index in expected.indices]
        assert [one.probability for one in found] == pytest.approx(expected.values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "change", [{"accepted": False}, {"format": "onnx_int8"}], ids=lambda change: next(iter(change))
)
def test_an_onnx_file_that_was_not_accepted_is_not_what_a_run_is_used_by(change, exported, tmp_path):
    run = RunDir(shutil.copytree(exported.path, tmp_path / "run", symlinks=True))
    found = manifest(run)
    found["exports"] = [row | change if row["format"] == "onnx" else row for row in found["exports"]]
    write_json_atomic(run.export_manifest, found)
    (rejected,) = [row for row in found["exports"] if row["file"] == "model.onnx"]
    assert launcher.load(run.path).file != run.exports / rejected["file"]
