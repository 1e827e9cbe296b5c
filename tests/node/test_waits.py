"""No wait longer than a few seconds ignores a first SIGTERM or Ctrl-C, and what is waited for has a name."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from launcher.backends.slurm import node_start
from launcher.errors import exit_code_of
from launcher.node import preflight, signals
from launcher.plan.launch_plan import LaunchPlan
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.system import network
from tests import ports, warm
from tests.nets import FACTORY

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes/debug.yaml")
HEED_S = 150.0
"""Far more than it takes on a busy machine, and far less than what is waited for takes."""
DEADLINE_S = 200
SIGNALS = [signal.SIGTERM, signal.SIGINT]


def address():
    """One that is no loopback, where this machine has any."""
    found = [one for one in network.interfaces().values() if not one.startswith("127.")]
    return found[0] if found else "127.0.0.1"


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Node:
    """`launch` of one node, in a session of its own."""

    def __init__(self, folder, rank, port, *changes, before=""):
        self.log = folder / f"node-{rank}.txt"
        arguments = (
            *(RECIPE, FACTORY, "post.enabled=false", *changes),
            *("--run-dir", "run", "--procs", "1", "--nodes", "2", "--node-rank", str(rank)),
            *("--rdzv-endpoint", f"{address()}:{port}"),
        )
        files = (self.log, self.log)
        self.process = warm.Started(arguments, cwd=folder, env=environment(), files=files, before=before)

    @property
    def output(self):
        return self.log.read_text()

    def until(self, condition, what):
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < end, f"it never came to {what}:\n{self.output}"
            time.sleep(0.02)

    def living(self):
        found = []
        for other in psutil.process_iter():
            try:
                if os.getsid(other.pid) == self.process.pid and other.status() != psutil.STATUS_ZOMBIE:
                    found.append(other)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def ends(self, code, *, within_s=HEED_S):
        found = self.process.wait(timeout=within_s)
        assert found == code, self.output
        assert self.living() == []
        return self.output


@pytest.fixture
def node(tmp_path):
    started = []
    port = ports.free()

    def start(rank, *changes, **options):
        started.append(Node(tmp_path, rank, port, *changes, **options))
        return started[-1]

    yield start
    for one in started:
        for left in one.living():
            left.kill()
        one.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_waiting_for_a_node_to_come(number, node, tmp_path):
    first = node(0)
    first.until(lambda: "waiting for node 1 to come" in first.output, "the wait")
    assert re.search(r"waiting for node 1 to come to \S+ \(1 of 2 are there\) since \d\d:\d\d:\d\d", first.output)
    first.process.send_signal(number)
    output = first.ends(75)
    assert "--node-rank 0 --rdzv-endpoint" in output
    assert "--node-rank 1 --rdzv-endpoint" in output
    assert RunDir(tmp_path / "run").read_status()["state"] == "preempted"


@pytest.mark.parametrize("number", SIGNALS)
def test_waiting_for_the_first_node_to_make_the_run(number, node):
    second = node(1)
    second.until(lambda: "waiting for node 0 to make run since" in second.output, "the wait")
    second.process.send_signal(number)
    assert "while waiting for node 0 to make run" in second.ends(75)


@pytest.mark.parametrize("number", SIGNALS)
def test_waiting_for_the_first_node_to_look_through_the_images(number, node, make_run, tmp_path):
    run = make_run("run", recipe=(ROOT / "recipes/debug.yaml").read_text())
    run.path.rename(tmp_path / "run")
    run = RunDir(tmp_path / "run")
    plan = {"run_id": "run", "nodes": 2, "backend": "torchrun", "rdzv_endpoint": "n1:29500", "created": 1.0}
    run.plan.write_text(json.dumps(plan))
    run.meetings.mkdir()  # they have met
    met = {"created": 1.0, "starts": [], "problems": [], "address": "127.0.0.1", "nodes": [0, 1]}
    run.meeting_by_hand.write_text(json.dumps(met))
    second = node(1)
    second.until(lambda: "waiting for node 0 to look through the images since" in second.output, "the wait")
    second.process.send_signal(number)
    output = second.ends(75)
    assert "while waiting for node 0 to look through the images" in output
    assert "launch resume run --node-rank 1" in output


@pytest.mark.slow
def test_a_node_whose_launcher_is_killed_is_named_and_the_others_save_and_leave(node, tmp_path):
    nodes = [
        node(rank, "train.epochs=200", "tracking.log_every=1", "train.checkpoint.every_steps=2") for rank in (0, 1)
    ]
    run = RunDir(tmp_path / "run")
    nodes[0].until(run.last_checkpoint.exists, "a checkpoint")
    nodes[1].process.kill()
    output = nodes[0].ends(75, within_s=DEADLINE_S)
    assert f"node 1 ({os.uname().nodename}) is gone" in output
    assert "is saved; go on with:" in output
    assert run.read_status()["state"] == "preempted"
    end = time.monotonic() + HEED_S
    while nodes[1].living() and time.monotonic() < end:  # its worker, which has saved with the other, leaves by itself
        time.sleep(0.02)
    assert nodes[1].living() == []


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_dies_whole_is_named_and_the_other_leaves(lost, node, tmp_path):
    nodes = [
        node(rank, "train.epochs=200", "tracking.log_every=1", "train.checkpoint.every_steps=2") for rank in (0, 1)
    ]
    run = RunDir(tmp_path / "run")
    nodes[1].until(run.last_checkpoint.exists, "a checkpoint")
    os.killpg(nodes[lost].process.pid, signal.SIGKILL)
    output = nodes[1 - lost].ends(75, within_s=DEADLINE_S)
    assert re.search(rf"node {lost}( \({os.uname().nodename}\))? is gone", output)  # it may die before it told its name
    assert run.read_status()["state"] == "preempted"
    (ended,) = events(run, "attempt_ended")[-1:]
    assert ended["cause"] == "lost_node"


STANDS_STILL = """
import os, signal
from launcher.engine import worker
worker.open_data_sets = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
"""
"""Has the workers stop themselves before they join the process group."""


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_worker_that_waits_for_one_that_never_comes(number, node, tmp_path):
    nodes = [node(0), node(1, before=STANDS_STILL)]
    run = RunDir(tmp_path / "run")

    def stands_still():
        with contextlib.suppress(psutil.Error):
            return any(one.status() == psutil.STATUS_STOPPED for one in nodes[1].living())

    nodes[1].until(stands_still, "a worker stands still")
    nodes[0].until(lambda: len(list(run.attempt_logs(1).glob("rank-*.log"))) == 2, "a worker")
    time.sleep(3)
    nodes[0].process.send_signal(number)
    nodes[0].ends(75)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_the_exports_are_left_off(number, tmp_path):
    log = tmp_path / "output"
    process = warm.Started([RECIPE, "--run-dir", "run"], cwd=tmp_path, env=environment(), files=(log, log))
    run = RunDir(tmp_path / "run")
    while not run.post_log.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=HEED_S) == 75, log.read_text()


def _in_a_job(wait, code):
    signals.hold()

    def main():
        wait()
        return 0

    code.value = exit_code_of(main)


def _preflight(folder):
    plan = LaunchPlan(run_id="a", name="a", nodes=2, address="127.0.0.1")
    preflight.run(folder, plan, seed=7, heed=node_start.heed_check)


def _meeting(folder):
    (folder / "node-0.json").touch()
    node_start.wait_for(folder / "meeting", 600, "node 0 to say where the nodes meet")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("wait", [_preflight, _meeting])
def test_waits_of_a_job(wait, number, tmp_path):
    context = multiprocessing.get_context("fork")
    code = context.Value("i", -1)
    process = context.Process(target=_in_a_job, args=(lambda: wait(tmp_path), code))
    process.start()
    while not (tmp_path / "node-0.json").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, number)
    process.join(HEED_S)
    try:
        assert (process.exitcode, code.value) == (0, 75)
    finally:
        process.kill()
