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
from dataclasses import replace
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
from launcher.tools import evaluate, export, formats, onnx_model, publish, quantize
from launcher.tools.gate import doubt, rejection
from launcher.tools.int8 import calibration, qat, torch_graph

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
FILES = {"onnx": "model.onnx", "torchscript": "model.ts", "int8": "model.int8.onnx"}
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
    post = PostConfig(export=["onnx", "torchscript"], quantize=["int8"], max_top1_drop=100.0, min_agreement=0.0)
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
    times = {"latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "latency_iqr_ms", "latency_runs"}
    rates = {"throughput_images_per_s", "throughput_batch"}
    assert set(found["reference"]) == {"format", "top1", "f1", "size_mb", *times, *rates}
    assert found["cpu"]["saturates_int8"] == host_cpu.saturates_int8()
    rows = {row["format"]: row for row in found["exports"]}
    assert {name: row["file"] for name, row in rows.items()} == FILES
    for row in rows.values():
        assert row["top1_drop"] == pytest.approx(100 * (found["reference"]["top1"] - row["top1"]))
        assert 0 < row["latency_p50_ms"] <= row["latency_p95_ms"] <= row["latency_p99_ms"]
        assert row["load_s"] > 0
        assert row["peak_memory_mb"] > row["size_mb"]
        assert row["throughput_images_per_s"] > 0
        assert row["top1_drop_interval"][0] <= row["top1_drop"] <= row["top1_drop_interval"][1]
        assert row["worst_class"]["class"] in CLASSES
    assert rows["onnx"]["agreement"] == rows["torchscript"]["agreement"] == 1.0
    for name in ("onnx", "torchscript"):
        assert (rows[name]["num_changed"], rows[name]["quantization"]) == (0, None)
        assert rows[name]["max_logit_diff"] < 1e-3
    int8 = rows["int8"]
    assert int8["num_changed"] == round(40 * (1 - int8["agreement"]))
    assert int8["quantization"] == {
        "target": "portable",
        "weight_bits": 7,
        "rung": "minmax",
        **CALIBRATED,
    }
    assert [(row["format"], row["rung"], row["accepted"]) for row in found["ladder"]] == [("int8", "minmax", True)]
    assert rows["int8"]["size_mb"] < 0.3 * rows["onnx"]["size_mb"]
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


def test_benchmark_times_the_files_beside_eager_pytorch_or_one_alone(exported, capsys):
    assert cli.main(["benchmark", str(exported.path), "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["model"]: row for row in found["models"]}
    assert list(rows) == ["eager PyTorch", "onnx", "torchscript", "int8"]
    assert all(row["latency_p50_ms"] > 0 and row["throughput_batch"] > 1 for row in rows.values())
    assert rows["int8"]["size_mb"] < rows["onnx"]["size_mb"]
    assert cli.main(["benchmark", str(exported.exports / "model.int8.onnx"), "--threads", "1"]) == 0
    assert "model.int8.onnx is 1" in capsys.readouterr().out
    assert cli.main(["benchmark", str(exported.exports / "model.ts")]) == 2
    assert "not an ONNX file" in capsys.readouterr().err


def test_nothing_half_made_is_left(exported):
    assert sorted(p.name for p in exported.exports.iterdir()) == ["manifest.json", *sorted(FILES.values())]


SAME = {"top1_drop": 0.0, "top1_drop_interval": [0.0, 0.0], "agreement": 1.0, "num_changed": 0}


def test_an_int8_model_is_refused_only_where_the_interval_says_that_it_loses_too_much():
    row = SAME | {"top1_drop": 2.2, "top1_drop_interval": [1.2, 3.4], "num_changed": 20}
    assert rejection(row, PostConfig(), num=5000, is_quantized=True) == (
        "loses 2.20 points of top-1 (95 % interval 1.20 to 3.40); post.max_top1_drop allows 1"
    )
    assert doubt(row, PostConfig(), num=5000) is None
    few = row | {"top1_drop_interval": [-0.5, 5.1]}
    assert rejection(few, PostConfig(), num=218, is_quantized=True) is None
    assert doubt(few, PostConfig(), num=218) == (
        "218 images are too few to say whether it loses more than 1 points (95 % interval -0.50 to 5.10)"
    )
    assert doubt(SAME, PostConfig(), num=218) is None


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
    row = SAME | {"top1_drop": 40.0, "top1_drop_interval": [30.0, 50.0], "agreement": 0.5, "num_changed": 50}
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


@pytest.fixture
def broken(monkeypatch):
    """Calibration that was spoilt: every range is a thousandth of what it was."""
    measure = calibration.measure
    spoilt = np.float32(1e-3)
    monkeypatch.setattr(
        calibration,
        "measure",
        lambda *args, **options: {
            name: dataclasses.replace(
                found,
                low=found.low * spoilt,
                high=found.high * spoilt,
                percentiles=tuple(1e-3 * end for end in found.percentiles),
            )
            for name, found in measure(*args, **options).items()
        },
    )


def test_an_int8_model_of_spoilt_ranges_is_never_shipped_and_the_next_format_is(tmp_path, photos, broken):
    run = make_run(tmp_path / "run", photos, arch="shufflenet_v2_x0_5", post=PostConfig(quantize=["int8", "fp16"]))
    run.exports.mkdir()
    (run.exports / "model.int8.onnx").write_bytes(b"of an earlier export")
    export.export_run(run)
    found = manifest(run)
    tried = [(row["format"], row["rung"]) for row in found["ladder"]]
    assert tried[:3] == [("int8", "minmax"), ("int8", "equalized"), ("int8", "percentile")]
    assert ("int8", "16 in float") in tried
    assert tried[-1] == ("fp16", "weights")
    assert all("agrees with the checkpoint on" in row["reason"] for row in found["ladder"][:-1])
    assert [(row["file"], row["accepted"]) for row in found["exports"]] == [
        ("model.onnx", True),
        ("model.fp16.onnx", True),
    ]
    assert sorted(file.name for file in run.exports.iterdir()) == ["manifest.json", "model.fp16.onnx", "model.onnx"]
    sizes = {row["format"]: row["size_mb"] for row in found["exports"]}
    assert sizes["fp16"] < 0.7 * sizes["onnx"]


def test_where_nothing_is_accepted_the_export_fails_and_ships_nothing(tmp_path, photos, monkeypatch):
    run = make_run(tmp_path / "run", photos, arch="shufflenet_v2_x0_5", post=PostConfig())
    monkeypatch.setitem(formats.FORMATS, "onnx", formats.Format(file="model.onnx", write=_write_zeros))
    before = run.best_checkpoint.resolve().stat().st_mtime_ns
    assert cli.main(["export", str(run.path)]) == 1
    assert [file.name for file in run.exports.iterdir()] == ["manifest.json"]
    found = manifest(run)
    assert [row["accepted"] for row in found["exports"]] == [False]
    assert "it is made from model.onnx, which is not accepted" in found["not_made"][0]["reason"]
    assert "not accepted" in run.report_html.read_text()
    assert run.best_checkpoint.resolve().stat().st_mtime_ns == before


def _write_zeros(target: Path, best: evaluate.BestModel) -> None:
    formats.write_onnx(target, best)
    model = onnx.load(target)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    onnx.save(model, target)


def test_a_file_that_was_killed_while_it_was_made_leaves_the_old_ones_whole(exported, tmp_path):
    run = RunDir(shutil.copytree(exported.path, tmp_path / "run", symlinks=True))
    before = {file.name: file.read_bytes() for file in run.exports.iterdir()}
    code = "import os, sys; from launcher.tools import export; from launcher.runs.run_dir import RunDir; "
    code += "export.latency.measure = lambda *a: os.kill(os.getpid(), 9); export.export_run(RunDir(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], check=False)
    assert done.returncode == -9
    left = {file.name: file.read_bytes() for file in run.exports.iterdir() if file.is_file()}
    assert left == before
    assert len(list(run.exports.glob(".export-*"))) == 1
    publish.remove_abandoned(run)
    assert not list(run.exports.glob(".export-*"))


def test_of_a_damaged_best_checkpoint_the_newest_whole_one_is_exported_and_told(exported, tmp_path, capfd):
    run = RunDir(shutil.copytree(exported.path, tmp_path / "run", symlinks=True))
    whole = checkpoint.load(run.best_checkpoint.resolve())
    checkpoint.write(run, dataclasses.replace(whole, step=5, state=whole.state | {"step": 5}))
    (run.best_checkpoint / "model.safetensors").write_bytes(b"damaged")
    assert cli.main(["export", str(run.path), "--format", "safetensors"]) == 0
    assert "the newest whole checkpoint is taken instead of the best one: step 5" in capfd.readouterr().out
    found = manifest(run)
    assert found["checkpoint"]["step"] == 5
    assert [(row["file"], row["agreement"]) for row in found["exports"]] == [("model.safetensors", 1.0)]
    assert sorted(file.name for file in run.exports.iterdir()) == ["manifest.json", "model.safetensors"]


def test_other_formats_agree_with_the_checkpoint_and_a_wrong_one_is_refused_with_the_valid_ones(
    exported, tmp_path, capsys
):
    run = RunDir(shutil.copytree(exported.path, tmp_path / "run", symlinks=True))
    wanted = [argument for name in ("torch_export", "state_dict") for argument in ("--format", name)]
    assert cli.main(["export", str(run.path), *wanted]) == 0
    rows = {row["format"]: row for row in manifest(run)["exports"]}
    assert set(rows) == {
        "onnx",
        "torchscript",
        "int8",
        "torch_export",
        "state_dict",
    }  # those of the same checkpoint stay
    for name in ("torch_export", "state_dict"):
        assert (rows[name]["agreement"], rows[name]["accepted"]) == (1.0, True)
    before = run.export_manifest.read_bytes()
    assert cli.main(["export", str(run.path), "--format", "onxx"]) == 2
    assert "--format onxx: no such format; did you mean 'onnx'" in capsys.readouterr().err
    assert run.export_manifest.read_bytes() == before


def test_each_quantized_format_that_is_named_is_made(exported, tmp_path):
    run = RunDir(shutil.copytree(exported.path, tmp_path / "run", symlinks=True))
    (run.exports / "model.int8.onnx").unlink()
    export.export_run(run, names=["int8", "int8_weights", "fp16"])
    rows = {row["format"]: row for row in manifest(run)["exports"] if row["accepted"]}
    assert {"int8", "int8_weights", "fp16"} <= set(rows)
    made = {"model.int8.onnx", "model.int8_weights.onnx", "model.fp16.onnx"}
    assert made <= {file.name for file in run.exports.iterdir()}
    assert rows["int8_weights"]["agreement"] > 0.97
    assert rows["int8_weights"]["size_mb"] < 0.3 * rows["onnx"]["size_mb"]
    said = onnx_model.read_quantization(run.exports / "model.int8_weights.onnx")
    assert said == {"rung": "weights", "weight_bits": 8, "activation_bits": 32, "calibration_images": 96}
    assert not onnx_model.overflows_here(run.exports / "model.int8_weights.onnx", {"quantization": json.dumps(said)})


def test_calibration_images_are_the_same_every_time(exported, tmp_path, monkeypatch):
    seen = []
    best = evaluate.load_best(exported)
    original = evaluate.BestModel.batches

    def spy(self, split, indices=None):
        seen.append((split, tuple(indices)))
        return original(self, split, indices)

    monkeypatch.setattr(evaluate.BestModel, "batches", spy)
    ladder = quantize.Ladder(source=exported.exports / "model.onnx", folder=tmp_path, best=best, threads=1)
    for _ in range(2):
        ladder.climb(["int8"], lambda name, file: (None, {}), lambda line: None)
    assert seen[0] == seen[1]
    assert seen[0][0] == "train"
    assert sorted(seen[0][1]) == list(range(96))


def test_the_last_way_to_int8_is_fine_tuning_which_leaves_the_checkpoint_alone(exported, tmp_path, monkeypatch):
    plain = evaluate.load_best(exported)
    best = replace(plain, recipe=replace(plain.recipe, post=replace(plain.recipe.post, qat_steps=2)))
    before = {name: value.clone() for name, value in best.module.state_dict().items()}
    ladder = quantize.Ladder(source=exported.exports / "model.onnx", folder=tmp_path, best=best, threads=1)
    tried = []

    def judge(name, file):
        tried.append(onnx_model.read_quantization(file))
        return None if tried[-1]["rung"] == "qat" else "refused", {}

    name, rows = ladder.climb(["int8", "fp16"], judge, lambda line: None)
    assert (name, rows[-1]["rung"], rows[-1]["is_made"]) == ("int8", "qat", True)
    assert tried[-1] == {"target": "portable", "weight_bits": 7, "rung": "qat", "qat_steps": 2, **CALIBRATED}
    assert tried[-2]["rung"] == "16 in float"
    assert all(torch.equal(value, before[name]) for name, value in best.module.state_dict().items())

    def fail(*_, **__):
        raise ValueError("of no use")

    monkeypatch.setattr(qat, "train", fail)
    _, rows = ladder.climb(["int8"], judge, lambda line: None)
    assert [rows[-1][key] for key in ("rung", "is_made", "reason")] == ["qat", False, "cannot be made: of no use"]
    command, ladder = ["launch", "export", "a run", "data.path=there"], replace(ladder, best=plain)
    said = []
    ladder.offer(rows, command, said.append)
    ladder.offer([row | {"is_made": False} for row in rows], command, said.append)
    monkeypatch.delitem(torch_graph.OPS, "Relu")
    ladder.offer(rows, command, said.append)
    assert [line.partition("minutes: ")[2] for line in said] == [
        "launch export 'a run' data.path=there post.qat_steps=200"
    ]


def test_fine_tuning_computes_a_network_as_onnx_runtime_does(tmp_path, photos):
    best = evaluate.load_best(make_run(tmp_path / "run", photos, arch="mobilenet_v3_small", post=PostConfig()))
    source = tmp_path / "model.onnx"
    formats.write_onnx(source, best)
    ladder = quantize.Ladder(source=source, folder=tmp_path, best=best, threads=1)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        found = torch_graph.TorchGraph(ladder._prepared()).compute(images, lambda name, value: value)
    (logits,) = onnxruntime.InferenceSession(source).run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(found, torch.from_numpy(logits), rtol=1e-3, atol=1e-4)


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
    assert [each["format"] for each in found["not_made"]] == ["int8"]
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
    assert rows["int8"] == before["int8"]
    assert rows["onnx"] == before["onnx"]
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
    assert {row["format"] for row in found["exports"]} == {"onnx", "int8", "torchscript"}  # which stays
    assert all(row["top1"] is not None for row in found["exports"])
    assert run.recipe.read_bytes() == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.path={tmp}", "data.path={tmp}: no images at {tmp}/val"),
        ("data.path={tmp}/other", "{tmp}/other/val: holds classes that the model does not know, as 'emu'"),
        ("data.path=", "only data.path=FOLDER and post.qat_steps=N (a whole number) can change"),
        ("model.arch=resnet50", "only data.path=FOLDER and post.qat_steps=N (a whole number) can change"),
        ("post.qat_steps=-1", "only data.path=FOLDER and post.qat_steps=N (a whole number) can change"),
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


@pytest.mark.parametrize("change", [{"accepted": False}, {"format": "int8"}], ids=lambda change: next(iter(change)))
def test_an_onnx_file_that_was_not_accepted_is_not_what_a_run_is_used_by(change, exported, tmp_path):
    run = RunDir(shutil.copytree(exported.path, tmp_path / "run", symlinks=True))
    found = manifest(run)
    found["exports"] = [row | change if row["format"] == "onnx" else row for row in found["exports"]]
    write_json_atomic(run.export_manifest, found)
    (rejected,) = [row for row in found["exports"] if row["file"] == "model.onnx"]
    assert launcher.load(run.path).file != run.exports / rejected["file"]
