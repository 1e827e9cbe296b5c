"""A stop signal is for training: what tracks a run sends the last of it, and in what state it was left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl
from launcher.tracking.trackers import Trackers
from tests.faults.bench import RECIPE, ROOT, write_images
from tests.nets import SLOW
from tests.tracking.hand_made import ENDED_S, finish, make_run, rows_of, steps_of, train, wait_until

pytestmark = pytest.mark.slow
LAUNCH = """
import sys
from launcher import cli
from launcher.tracking import trackers
trackers.STOPPED_S = float(sys.argv.pop(1))  # this machine may be busy
sys.exit(cli.main())
"""


def test_a_stopped_run_is_sent_to_its_last_step_and_as_preempted(tmp_path):
    run = RunDir(tmp_path / "run")
    changes = (f"data.path={write_images(tmp_path / 'photos')}", SLOW, "train.epochs=50")
    changes += ("tracking.wandb.mode=offline", "tracking.log_every=1", "--run-dir", str(run), "--procs", "1")
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(ENDED_S), str(RECIPE), *changes],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: list(run.wandb.glob("offline-run-*")) and rows_of(run))
        (own,) = (one for one in psutil.Process(process.pid).children() if "launcher.tracking" in one.cmdline())
        for one in (own, *own.children(recursive=True)):
            one.send_signal(signal.SIGUSR2)  # SLURM's early signal, which all processes of a job get
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=ENDED_S)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert "wandb:" not in said
    assert steps_of(run) == [line["step"] for line in read_jsonl(run.metrics)]
    assert json.loads(run.tracked("wandb-offline").read_text())["state"] == "preempted"
    assert len(list(run.wandb.glob("offline-run-*"))) == 1


def test_a_signal_to_every_process_of_a_job_loses_nothing(tmp_path):
    """As scancel sends it: wandb-core heeds it, whatever its parent does."""
    run, said = make_run(tmp_path), []

    def grows():
        train(run, 1 + len(list(read_jsonl(run.metrics))))
        return True

    with Trackers(run, ["wandb"], say=said.append, beside=True) as found:
        wait_until(lambda: grows() and steps_of(run))  # so it has its service, and no longer begins
        (pid,) = found.pids()
        for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            one.send_signal(signal.SIGTERM)
        wait_until(lambda: said)
        grows()
        finish(run, "preempted")
        found.finish(ENDED_S)
    assert said[0] == "wandb: a process of its tracker was killed; it is started again, and goes on from here"
    assert found.codes == [0]
    assert steps_of(run) == [line["step"] for line in read_jsonl(run.metrics)]
    assert len(list(run.wandb.glob("offline-run-*"))) == 1


def test_a_signal_does_not_end_a_tracker_that_has_just_begun_and_a_kill_at_the_end_is_made_good(tmp_path):
    run, said = make_run(tmp_path), []
    train(run, 1)
    found = Trackers(run, ["wandb"], say=said.append, beside=True)
    with found:
        wait_until(lambda: found._trackers[0]._process)
        os.kill(found._trackers[0]._process.pid, signal.SIGTERM)
        train(run, 2)
        finish(run)
        found._trackers[0].tell_over()
        os.kill(found._trackers[0]._process.pid, signal.SIGKILL)
        found.finish(ENDED_S)
    (line,) = [line for line in said if "sending the rest" not in line]
    assert "wandb: its tracker was killed (SIGKILL); it is started again" in line
    assert steps_of(run) == [1, 2]
