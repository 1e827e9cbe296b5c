"""``--detach`` without SLURM: the run goes on in the background, and is found again."""

from __future__ import annotations

import os
import time

import pytest

from launcher.runs import whereabouts
from launcher.runs.run_dir import RunDir
from launcher.system import processes
from tests.nets import FACTORY

END_S = 120
SMALL = (
    "data.name=digits",
    FACTORY,
    "model.weights=null",
    "batch.size=8",
    "post.enabled=false",
)


@pytest.mark.slow
def test_a_detached_run_outlives_its_command_and_is_cancelled_like_any_other(launch, recipe_file):
    done = launch(str(recipe_file("name: a\n")), "--detach", "--run-dir", "run", *SMALL, "train.epochs=500")
    assert done.returncode == 0, done.stderr
    run = RunDir(launch.cwd / "run")
    pid = whereabouts.process_of(run)
    assert f"process {pid} goes on in the background (log: " in done.stdout
    assert os.getsid(pid) == pid
    again = launch("resume", "run")
    assert (again.returncode, f"runs as process {pid}" in again.stderr) == (2, True)
    deadline = time.monotonic() + END_S
    while not run.metrics.exists():
        assert time.monotonic() < deadline, run.launch_log(0).read_text()
        time.sleep(0.2)
    assert "running" in launch("ps", ".").stdout
    assert launch("cancel", "run").returncode == 0
    assert processes.start_time(pid) is None
    assert run.read_status()["state"] == "cancelled"
    assert "go on with: launch resume" in run.launch_log(0).read_text()


@pytest.mark.parametrize("flag", ["--debug", "--backend=local"])
def test_what_is_for_a_terminal_cannot_be_detached(launch, recipe_file, flag):
    done = launch(str(recipe_file("name: a\n")), "--detach", flag, *SMALL)
    assert done.returncode == 2
    assert "--detach: --debug and launch.backend=local are for a terminal" in done.stderr
    assert not (launch.cwd / "runs").exists()


def test_a_sweep_that_runs_here_cannot_be_detached(launch, recipe_file):
    done = launch(str(recipe_file("name: a\n")), "--detach", "--sweep", *SMALL, "optim.lr=0.1,0.2")
    assert (done.returncode, "--detach: without SLURM a sweep's runs" in done.stderr) == (2, True)


def test_a_cache_that_cannot_be_made_is_named_with_its_variable(launch, recipe_file):
    home = {"HOME": "/proc/nobody", "FINETUNE_LAUNCHER_CACHE": "", "XDG_CACHE_HOME": ""}
    done = launch(str(recipe_file("name: a\n")), *SMALL, env=home)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "set FINETUNE_LAUNCHER_CACHE to a folder that can be written to" in done.stderr
