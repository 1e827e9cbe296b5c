"""Whole runs on GPUs, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.runs import history
from launcher.runs.run_dir import RunDir

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 280
RECIPE = """
name: gpu
model: {{arch: squeezenet1_1, weights: null}}
data: {{path: {photos}, image_size: 32, augment: none, workers: 0}}
batch: {{size: 4}}
train: {{epochs: 2, checkpoint: {{every_steps: 2, every_minutes: null}}, early_stopping: {{patience: null}}}}
tracking: {{wandb: {{mode: disabled}}, log_every: 1}}
post: {{enabled: false}}
"""
KILLER = """
import os
import signal


class Killer:
    def step(self, step):
        if step == 3 and os.environ["LAUNCH_ATTEMPT"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def launch(tmp_path, photos, where):
    """Run `launch …` with some workers (None: a command that takes none); return the finished process."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(photos=photos))

    def call(*arguments, num=1):
        number = ("--gpus", str(num)) if where.type == "cuda" else ("--procs", str(num), "launch.device=cpu")
        number = () if num is None else number
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *arguments, *number],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "FINETUNE_LAUNCHER_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        return done

    return call


def test_a_killed_worker_ends_no_run(launch, tmp_path, several):
    """The others wait for it in a collective of NCCL's."""
    (tmp_path / "killer.py").write_text(KILLER)
    run = RunDir(tmp_path / "run")
    launch("recipe.yaml", "train.listeners=[killer.py:Killer]", "--run-dir", str(run.path), num=several)
    assert [event["cause"] for event in history.events(run, "attempt_ended")] == ["lost_worker"]
    assert len(history.events(run, "attempt_started")) == 2
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["split"] == "val"] == [0, 1]


def test_the_first_training_images_are_shown_from_batches_on_the_gpu(launch, tmp_path):
    run = RunDir(tmp_path / "run")
    sizes = ("data.workers=1", "batch.size=14", "train.epochs=1")
    launch("recipe.yaml", *sizes, "data.mixup=0.2", "--run-dir", str(run.path))
    found = json.loads(run.sample_batch.read_text())  # exports, which would draw it, are off
    assert len([row for row in found["images"] if row["picture"]]) == 12


def test_batches_are_tuned_and_equal_gpus_measure_once(launch, where):
    done = launch("tune", "recipe.yaml", "--json", num=where.num)
    ranks = json.loads(done.stdout)["ranks"]
    assert all(rank["needed_bytes"] <= rank["budget_bytes"] for rank in ranks)
    if where.type == "cuda" and len({(rank["device"], rank["total_bytes"]) for rank in ranks}) == 1:
        assert sum(rank["from"] == "probes" for rank in ranks) < max(2, where.num)


def test_a_run_is_exported_and_its_export_measured(launch, tmp_path):
    run = RunDir(tmp_path / "run")
    launch("recipe.yaml", "post.enabled=true", "post.export=[onnx]", "post.quantize=[]", "--run-dir", str(run.path))
    (row,) = [one for one in json.loads(run.export_manifest.read_text())["exports"] if one["file"] == "model.onnx"]
    assert row["agreement"] >= 0.99


def test_evaluate_gives_the_numbers_of_the_runs_own_validation(launch, tmp_path, where):
    run = RunDir(tmp_path / "run")
    launch("recipe.yaml", "--run-dir", str(run.path), num=where.num)
    best = run.read_status()["best"]
    lines = map(json.loads, run.metrics.read_text().splitlines())
    (own,) = [line for line in lines if line["split"] == "val" and line["step"] == best["step"]]
    found = json.loads(launch("evaluate", str(run.path), "--json", num=None).stdout)
    assert found["differs"] is None
    assert found["loss"] == pytest.approx(own["loss"], rel=1e-3)  # cuDNN may take other algorithms
    assert found["auroc"] == pytest.approx(own["auroc"], abs=1e-2)
