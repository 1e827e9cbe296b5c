"""A run with a model, a data set and a transform of the user's own: killed, resumed, moved, exported elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
from safetensors.torch import load_file

from launcher.runs.run_dir import RunDir

pytestmark = pytest.mark.slow
NO_EXPORTS = "post.enabled=false"


def weights(run):
    return (run.last_checkpoint / "model.safetensors").read_bytes()


def kill_in_the_middle(project, run, *arguments):
    """SIGKILL to every process of a run that has taken some steps of its first epoch and written a checkpoint."""
    process = project.start("recipe.yaml", "--run-dir", run.path, *arguments, slow_s=0.1)
    deadline = time.monotonic() + 200
    while not (run.last_checkpoint / "manifest.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    state = json.loads((run.last_checkpoint / "state.json").read_text())
    assert 0 < state["step"] < 12


def test_killed_and_resumed_it_ends_with_the_same_bits(project):
    whole, killed = project.run_dir("whole"), project.run_dir("killed")
    project.launch("recipe.yaml", "--run-dir", whole.path, "--procs", "2", NO_EXPORTS)
    kill_in_the_middle(project, killed, "--procs", "2", NO_EXPORTS)
    project.launch("resume", killed.path, cwd=project.folder.parent)
    assert weights(killed) == weights(whole)
    assert (killed.read_status()["step"], killed.read_status()["state"]) == (12, "completed")


def test_the_number_of_loader_processes_changes_no_bit(project):
    runs = [project.run_dir(f"workers-{number}") for number in (0, 3)]
    for run, number in zip(runs, (0, 3), strict=True):
        arguments = (f"data.workers={number}", "train.epochs=1", NO_EXPORTS)
        project.launch("recipe.yaml", "--run-dir", run.path, "--procs", "1", *arguments)
    assert weights(runs[0]) == weights(runs[1])


def test_a_resume_runs_what_was_launched_and_tells_of_changes(project):
    run = project.run_dir("run")
    project.launch("recipe.yaml", "--run-dir", run.path, "--procs", "1", "train.epochs=1", NO_EXPORTS)
    project.change("blocks.py", "nn.ReLU()", "nn.Sigmoid()")
    told = project.launch("resume", run.path, "train.epochs=2")
    changed = f"{project.folder / 'blocks.py'} has changed since the run was launched"
    assert changed in told
    assert "launch resume ../run --new-code" in told
    assert "ReLU" in (run.code / "blocks.py").read_text()
    told = project.launch("resume", run.path, "train.epochs=3", "--new-code")
    assert f"{changed}, is taken anew" in told
    assert "Sigmoid" in (run.code / "blocks.py").read_text()
    used = [json.loads(line).get("used") for line in run.events.read_text().splitlines()]
    assert [one for one in used if one] == ["copy", "new"]


def test_a_run_that_was_moved_goes_on_and_exports_without_the_originals(project):
    run = project.run_dir("run")
    project.launch("recipe.yaml", "--run-dir", run.path, "--procs", "1", "train.epochs=1", NO_EXPORTS)
    moved, elsewhere = RunDir(project.folder.parent / "moved"), project.folder.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.move(run.path, moved.path)
    for file in project.folder.glob("*.py"):
        file.unlink()
    told = project.launch("resume", moved.path, "train.epochs=2", cwd=elsewhere)
    assert "has changed" not in told
    assert "recipe changed: model" not in told
    assert moved.read_status()["epoch"] == 2
    project.launch("export", moved.path, cwd=elsewhere)
    manifest = json.loads(moved.export_manifest.read_text())
    assert [row["format"] for row in manifest["exports"]] == ["onnx", "int8"]
    assert all(row["agreement"] > 0.9 for row in manifest["exports"])
    assert manifest["preprocessing"]["transform"] == "code/augment.py:make"
    assert "the user's own, code/net.py:Net" in moved.model_card.read_text()
    again = elsewhere / "again"
    project.launch(moved.recipe, "--run-dir", again, "--debug", cwd=elsewhere)
    assert set(load_file(again / "checkpoints" / "last" / "model.safetensors")) >= {"fc.weight", "body.0.weight"}


def test_a_dry_run_shows_what_would_be_copied_and_writes_nothing(project):
    before = sorted(project.folder.rglob("*"))
    told = project.launch("recipe.yaml", "--dry-run")
    for name in ("net.py", "blocks.py", "shapes.py", "augment.py"):
        assert f"code         {name} <- {project.folder / name}\n" in told
    assert "installed    torch " in told
    assert sorted(project.folder.rglob("*")) == before


def test_each_run_of_a_sweep_has_its_copy(project):
    base = project.run_dir("sweep").path
    overrides = ("optim.lr=0.1,0.2", "train.epochs=1", NO_EXPORTS)
    project.launch("recipe.yaml", "--sweep", "--run-dir", base, "--procs", "1", *overrides)
    copies = sorted(path.parent.name for path in base.glob("*/code"))
    assert len(copies) == 2
    for path in base.glob("*/code/net.py"):
        assert path.read_bytes() == (project.folder / "net.py").read_bytes()


def test_batch_sizes_are_tuned_with_the_users_model(project):
    told = project.launch("tune", "recipe.yaml", "--procs", "1", "--json")
    assert json.loads(told[told.index("{") :])["ranks"][0]["batch_size"] >= 1
