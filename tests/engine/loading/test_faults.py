"""Runs whose loader processes lack something, or do not answer: they train all the same, or stop when they are told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.runs.run_dir import RunDir
from launcher.system import processes
from tests.nets import FACTORY

ROOT = Path(__file__).parents[3]
END_S = 200
TINY = (
    "post.enabled=false",
    "data.name=digits",
    "data.image_size=32",
    "data.workers=2",
    "batch.size=64",
    "train.epochs=1",
    FACTORY,
    "model.weights=null",
    "tracking.wandb.mode=disabled",
)


@pytest.fixture
def few(images):
    """What has a run take few images, in five steps."""
    return ("data.name=imagefolder", f"data.path={images}", "batch.size=2")


@pytest.fixture
def start(tmp_path, recipe_file):
    """Start a training on two ranks; whatever it leaves is ended."""
    started = []
    recipe = recipe_file("name: tiny\n")

    def run(*overrides, within=(), env=None):
        own = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **(env or {})}
        command = [sys.executable, "-m", "launcher", str(recipe), "--procs", "2", "--run-dir", "run", *TINY, *overrides]
        with (tmp_path / "output").open("w") as output:
            process = subprocess.Popen(
                [*within, *command], cwd=tmp_path, env=os.environ | own, stdout=output, stderr=subprocess.STDOUT
            )
        started.append(process)
        return process

    yield run
    for process in started:
        for pid in [*processes.descendants(process.pid), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def output(tmp_path):
    return (tmp_path / "output").read_text()


@pytest.mark.slow
def test_a_temporary_folder_with_a_long_path_is_no_matter(start, few, tmp_path):
    folder = tmp_path / ("x" * 110)
    folder.mkdir()
    process = start(*few, env={"TMPDIR": str(folder)})
    assert process.wait(END_S) == 0, output(tmp_path)
    assert "loader processes" not in output(tmp_path)
    assert not list(folder.glob("pymp-*"))


@pytest.mark.slow
def test_with_few_open_files_a_run_takes_fewer_loader_processes_and_says_so(start, few, tmp_path):
    process = start(*few, within=("sh", "-c", 'ulimit -n 64 && exec "$@"', "sh"))
    assert process.wait(END_S) == 0, output(tmp_path)
    assert "files can be opened" in output(tmp_path)
    assert "raise the hard limit (ulimit -n)" in output(tmp_path)
    (first, *_) = [line for line in RunDir(tmp_path / "run").events.read_text().splitlines() if "fewer_loaders" in line]
    assert json.loads(first)["rank"] in (0, 1)


@pytest.mark.slow
def test_a_low_limit_that_may_be_raised_is_raised(start, few, tmp_path):
    process = start(*few, within=("sh", "-c", 'ulimit -Sn 64 && exec "$@"', "sh"))
    assert process.wait(END_S) == 0, output(tmp_path)
    assert "loader processes" not in output(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounts a small /dev/shm of its own")
def test_with_little_shared_memory_a_run_looks_less_far_ahead_and_says_so(start, tmp_path):
    mount = 'mount -t tmpfs -o size=4m none /dev/shm && exec "$@"'
    process = start("batch.size=128", "data.image_size=64", within=("unshare", "-m", "sh", "-c", mount, "sh"))
    assert process.wait(END_S) == 0, output(tmp_path)
    assert "MB of /dev/shm are there for a rank" in output(tmp_path)


def loaders(process):
    """The loader processes of each rank, by the rank's process id."""
    ranks = [pid for pid in processes.children(process.pid) if processes.children(pid)]
    return {rank: processes.children(rank) for rank in ranks}


@pytest.mark.slow
def test_a_rank_that_waits_for_images_heeds_a_stop_and_the_position_is_kept(start, tmp_path):
    run = RunDir(tmp_path / "run")
    process = start("train.epochs=50", "tracking.log_every=1")
    deadline = time.monotonic() + END_S
    while not (run.metrics.exists() and run.metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, output(tmp_path)
        time.sleep(0.1)
    while len(of_ranks := loaders(process)) != 2:  # one epoch may just end
        assert time.monotonic() < deadline, output(tmp_path)
    for pid in max(of_ranks.items())[1]:  # as if they read from a file system that hangs
        os.kill(pid, signal.SIGSTOP)
    before = -1
    while before != (before := run.metrics.read_text().count("\n")):
        time.sleep(2)
    below = processes.descendants(process.pid)
    began = time.monotonic()
    process.terminate()
    assert process.wait(END_S) == 75, output(tmp_path)
    assert time.monotonic() - began < 60
    assert not [pid for pid in below if processes.start_time(pid)]
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert run.last_checkpoint.resolve().name == f"step-{max(steps):08d}"
    assert f"the checkpoint step-{max(steps):08d} is saved" in output(tmp_path)
