"""`launch` as a person runs it: real workers, real files; signals and kills are in tests/faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launcher.images import scan as image_scan
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl
from tests import ports, warm
from tests.nets import FACTORY

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes/debug.yaml")
NO_POST = "post.enabled=false"
DEADLINE_S = 240


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tmp_path):
    """Start `launch …` in a session of its own; whatever is left of it is killed at the end.

    With ``is_warm`` in a process that has torch imported already: for tests of what a run does, not of how it starts.
    """
    started = []

    def _start(*arguments: str, is_warm: bool = False) -> subprocess.Popen[str] | warm.Started:
        log, env = tmp_path / f"output-{len(started)}.txt", os.environ | ENVIRONMENT
        if is_warm:
            process = warm.Started(arguments, cwd=tmp_path, env=env, files=(log, log))
        else:
            with log.open("w") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "launcher", *arguments],
                    cwd=tmp_path,
                    env=env,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        process.log = log
        started.append(process)
        return process

    yield _start
    for process in started:
        for left in session_of(process):
            left.kill()
        process.wait()


def output_of(process: subprocess.Popen[str] | warm.Started) -> str:
    """What it has printed, at its end."""
    process.wait(DEADLINE_S)
    return process.log.read_text(encoding="utf-8")


def session_of(process: subprocess.Popen[str] | warm.Started) -> list[psutil.Process]:
    """All living processes of the session that ``process`` leads."""
    found = []
    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) == process.pid and other.status() != psutil.STATUS_ZOMBIE:
                found.append(other)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def test_a_run_leaves_everything_the_contract_names(start, tmp_path):
    process = start(RECIPE, FACTORY, "train.epochs=2", "post.min_agreement=0.5", "--run-dir", "run")
    output = output_of(process)
    assert process.returncode == 0, output
    run = RunDir(tmp_path / "run")
    assert run.read_status()["state"] == "completed"
    assert run.read_status()["best"]["metric"] == "val/loss"
    plan = run.read_plan()
    assert plan.world_size == 2
    assert run.run_id == plan.run_id
    for file in (
        run.recipe,
        run.metrics,
        run.events,
        run.report_html,
        run.report_json,
        run.model_card,
        run.export_manifest,
        run.exports / "model.onnx",
        run.exports / "model.int8.onnx",
        run.best_checkpoint / "manifest.json",
        run.rank_log(1, 0),
        run.rank_log(1, 1),
    ):
        assert file.is_file(), file
    state = json.loads((run.last_checkpoint / "state.json").read_text())
    assert (state["epoch"], state["offset"], state["step"]) == (2, 0, 2 * 12)  # 1437 images, 2 x 64 a step
    assert [m["samples"] for m in read_jsonl(run.metrics) if m["split"] == "val"] == [360] * 2
    exports = json.loads(run.export_manifest.read_text())["exports"]
    assert {e["format"]: e["agreement"] for e in exports}["onnx"] == 1.0
    assert re.search(r"^making model\.onnx: \d+\.\d s$", output, re.MULTILINE)  # a phase of the exports, with its time
    assert re.search(r"^model\.int8\.onnx: minmax: agreement ", output, re.MULTILINE)
    assert "model.int8.onnx: minmax: agreement " in run.post_log.read_text()
    last_lines = output.strip().splitlines()[-3:]
    assert last_lines[0].split() == ["run:", "run"]
    assert last_lines[1].split() == ["report:", "run/report.html"]
    assert last_lines[2].startswith("next:")
    assert session_of(process) == []


@pytest.fixture
def photos(images, tmp_path):
    """A user's own image folder."""
    return shutil.copytree(images, tmp_path / "photos")


def break_unseen(file):
    """Put rubbish in a file's place, of its size and its time: what was known of the file is now wrong."""
    before = file.stat()
    file.write_bytes(b"x" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def spoil(photos):
    """Two bad training images and a bad validation image."""
    first, second = sorted((photos / "train/cat").iterdir())[:2]
    val = min((photos / "val/dog").iterdir())
    first.write_bytes(b"not an image")
    second.write_bytes(second.read_bytes()[:60])
    val.write_bytes(b"")
    return [str(file.relative_to(photos)) for file in (first, second, val)]


def test_bad_images_are_refused_before_anything_is_written(start, tmp_path, photos):
    bad = spoil(photos)
    process = start(RECIPE, "data.name=imagefolder", f"data.path={photos}", "--run-dir", "run", is_warm=True)
    output = output_of(process)
    assert process.returncode == 2, output
    assert "nothing was started" in output
    assert "data.on_bad_image=quarantine" in output
    assert all(path in output for path in bad)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("debug", [False, True])
def test_bad_images_are_left_out_on_every_rank_and_listed(start, tmp_path, photos, debug):
    bad = spoil(photos)
    data = ("data.name=imagefolder", f"data.path={photos}", "data.on_bad_image=quarantine")
    small = (FACTORY, "post.quantize=[]")
    how = ["--debug", "batch.size=auto"] if debug else []
    process = start(RECIPE, *small, *data, "--run-dir", "run", *how, is_warm=True)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "3 images are left out" in output
    run = RunDir(tmp_path / "run")
    found = json.loads(run.bad_images.read_text())
    assert [image["path"] for image in found["images"]] == bad
    assert found["scanned"] == 24
    if debug:
        return
    assert [m["samples"] for m in read_jsonl(run.metrics) if m["split"] == "val"] == [5]
    assert json.loads(run.export_manifest.read_text())["val_samples"] == 5
    assert json.loads(run.report_json.read_text())["bad_images"]["images"] == found["images"]
    assert all(path in run.report_html.read_text() for path in bad)
    assert "3 images that cannot be decoded" in run.model_card.read_text()


def test_an_image_that_breaks_later_ends_the_run_once_and_why_names_it(start, tmp_path, photos):
    data = photos
    image_scan.scan(data)
    broken = min((data / "train/cat").iterdir())
    break_unseen(broken)
    process = start(
        *(RECIPE, FACTORY),
        "data.name=imagefolder",
        f"data.path={data}",
        NO_POST,
        "launch.max_restarts=3",
        "--run-dir",
        "run",
        is_warm=True,
    )
    output = output_of(process)
    assert process.returncode == 1, output
    assert str(broken) in output
    assert "Traceback (most recent call last)" not in output
    run = RunDir(tmp_path / "run")
    assert [e["attempt"] for e in events(run, "attempt_started")] == [1]  # the same image would end each restart
    assert run.read_status()["state"] == "failed"
    why = start("why", "run", is_warm=True)
    explained = output_of(why)
    assert why.returncode == 0
    assert str(broken) in explained
    assert "repair or remove the file" in explained
    assert session_of(process) == []


def test_two_nodes_started_by_hand_make_one_run(start, tmp_path, images):
    endpoint = f"127.0.0.1:{ports.free()}"
    processes = [
        start(
            *(
                RECIPE,
                FACTORY,
                NO_POST,
                "data.name=imagefolder",
                f"data.path={images}",
                "--procs",
                "1",
                "--nodes",
                "2",
                "--node-rank",
                str(rank),
            ),
            *("--rdzv-endpoint", endpoint, "--run-dir", "run"),
        )
        for rank in (1, 0)
    ]
    outputs = [output_of(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    run = RunDir(tmp_path / "run")
    assert json.loads((run.last_checkpoint / "state.json").read_text())["world_size"] == 2
    assert [m["samples"] for m in read_jsonl(run.metrics) if m["split"] == "val"] == [6]
    assert {e["node"] for e in events(run, "attempt_started")} == {0, 1}


def test_a_local_sweep_runs_in_turn_and_a_failed_run_stops_no_other(start, tmp_path, images, photos):
    broken = photos
    image_scan.scan(broken)
    for file in (broken / "train").rglob("*.png"):
        break_unseen(file)
    folders = (f"{images}", f"{broken}", f"{images}, image_size: 64")
    data = "data=" + ",".join(f"{{name: imagefolder, path: {folder}}}" for folder in folders)
    sweep = ("--backend", "torchrun", "--sweep", "--run-dir", "sweep")
    process = start(RECIPE, data, "batch.size=32", NO_POST, FACTORY, *sweep, is_warm=True)
    output = output_of(process)
    assert process.returncode == 1, output
    runs = [RunDir(folder) for folder in sorted((tmp_path / "sweep").glob("[0-9]-*"))]
    assert [run.read_status()["state"] for run in runs] == ["completed", "failed", "completed"]
    assert "cannot be decoded as an image" in output
    comparison = output[output.rindex("run 3 of 3") :]
    assert all(run.path.name in comparison for run in runs)
    assert session_of(process) == []


def test_a_rare_class_is_named_and_top_5_of_three_classes_is_not_shown(warm_launch, recipe_file, images):
    recipe = recipe_file(
        f"data: {{path: {images}, image_size: 32}}\n"
        "batch: {size: 6}\ntrain: {epochs: 1}\noptim: {warmup_epochs: 0}\nlaunch: {device: cpu}\n"
    )
    done = warm_launch(recipe, FACTORY, "--run-dir", "run", NO_POST, "tracking.wandb.mode=disabled")
    assert done.returncode == 0, done.stderr
    assert "warning: few training images of cat (6), dog (6), fox (6): expect little" in done.stdout
    assert "top5" not in done.stdout
    run = RunDir(warm_launch.cwd / "run")
    assert [event["classes"] for event in events(run, "rare_classes")] == [{"cat": 6, "dog": 6, "fox": 6}]
    card = run.model_card.read_text()
    assert "expect little of these classes: cat (6), dog (6), fox (6)." in card
    assert "top-5" not in card
    assert [line["top5"] for line in read_jsonl(run.metrics) if line["split"] == "val"] == [1.0]
