from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher.node import watchdog
from launcher.node.watchdog import Watchdog
from launcher.runs import diagnose, heartbeats
from launcher.runs.heartbeats import (
    BUILDING,
    FIRST,
    JOINING,
    MEASURING,
    MEETING,
    STARTING,
    TRAINING,
    Beat,
    Heartbeats,
)
from launcher.runs.run_dir import RunDir

WORKER = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR1, sys.stderr)
def stuck_here():
    print("ready", flush=True)
    time.sleep(1000)
stuck_here()
"""


@pytest.fixture
def run(tmp_path):
    found = RunDir(tmp_path / "run")
    found.create()
    for folder in (found.attempt_logs(1), found.attempt_errors(1)):
        folder.mkdir(parents=True)
    return found


@pytest.fixture
def worker(run):
    """A process that is stuck in a function, with its stacks on SIGUSR1 in its log, as a worker has them."""
    with run.rank_log(1, 5).open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", WORKER], stderr=log, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_stacks_that_come_late_are_waited_for(run, worker, monkeypatch):
    """As on a machine that is busy."""
    monkeypatch.setattr(watchdog, "DUMP_S", 0.1)
    monkeypatch.setattr(watchdog, "DUMP_FACTOR", 600)
    signal_now = watchdog._signal

    def signal_late(found, number):
        threading.Timer(1.0 if number == heartbeats.DUMP_SIGNAL else 0.0, signal_now, (found, number)).start()

    monkeypatch.setattr(watchdog, "_signal", signal_late)
    beat = Beat(age_s=2.0, pid=worker.pid, rank=5)
    Watchdog(run, Heartbeats(1), timeout_s=1.0, node_rank=0, attempt=lambda: 1)._end([beat])
    assert "stuck_here" in json.loads(run.rank_error(1, 5).read_text())["traceback"]


def test_the_flight_recorder_is_asked_where_there_is_one(run, worker, monkeypatch):
    """NCCL's own end of the pipe is not to be had here: a mock reads it."""
    monkeypatch.setattr(watchdog, "DUMP_S", 0.0)
    pipe = Path(f"{run.nccl_pipe(1)}5.pipe")
    os.mkfifo(pipe)
    try:
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        Watchdog(run, Heartbeats(1), timeout_s=1.0, node_rank=0, attempt=lambda: 1)._end(
            [Beat(age_s=2.0, pid=worker.pid, rank=rank) for rank in (5, 6)]  # 6 has no pipe
        )
        assert os.read(reader, 10) == b"1\n"
        os.close(reader)
    finally:
        pipe.unlink()


def test_a_worker_beats_in_memory_that_its_parent_reads():
    beats = Heartbeats(3)
    assert beats.read() == []
    child = os.fork()
    if child == 0:
        beats.beat(1, 7)
        os._exit(0)
    os.waitpid(child, 0)
    (beat,) = beats.read()
    assert (beat.rank, beat.pid) == (7, child)
    assert 0 <= beat.age_s < 60
    beats.beat(0, 6)
    beats.rest(1)
    assert [beat.rank for beat in beats.read()] == [6]
    beats.clear()
    assert beats.read() == []


def test_a_worker_that_takes_no_step_is_ended_and_what_it_was_doing_is_kept(run, worker, monkeypatch):
    monkeypatch.setattr(watchdog, "POLL_S", 0.05)
    monkeypatch.setattr(watchdog, "DUMP_S", 0.5)
    beats = Heartbeats(1)
    with Watchdog(run, beats, timeout_s=0.2, node_rank=3, attempt=lambda: 1):
        time.sleep(0.5)
        assert worker.poll() is None  # before its first step a worker may take its time
        monkeypatch.setattr(os, "getpid", lambda: worker.pid)
        beats.beat(0, 5)
        monkeypatch.undo()
        assert worker.wait(timeout=60) == -signal.SIGKILL
    error = json.loads(run.rank_error(1, 5).read_text())
    assert (error["kind"], error["rank"], error["node"], error["waiting"]) == ("hang", 5, 3, False)
    assert "stuck_here" in error["message"]
    assert "stuck_here" in error["traceback"]


@pytest.mark.parametrize("timeout_s", [30.0, None])
def test_a_worker_that_gets_on_is_left_alone(run, worker, monkeypatch, timeout_s):
    monkeypatch.setattr(watchdog, "POLL_S", 0.05)
    beats = Heartbeats(1)
    monkeypatch.setattr(os, "getpid", lambda: worker.pid)
    beats.beat(0, 5)
    with Watchdog(run, beats, timeout_s=timeout_s, node_rank=0, attempt=lambda: 1):
        time.sleep(0.5)
    assert worker.poll() is None
    assert not run.rank_error(1, 5).exists()


@pytest.mark.parametrize("phase", [STARTING, BUILDING, FIRST])
def test_a_worker_that_hangs_before_its_first_step_is_ended_and_its_phase_is_told(run, worker, monkeypatch, phase):
    monkeypatch.setattr(watchdog, "POLL_S", 0.05)
    monkeypatch.setattr(watchdog, "DUMP_S", 0.5)
    monkeypatch.setattr(heartbeats, "START_LEAST_S", 1.0)
    beats, start = Heartbeats(1), time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: worker.pid)
        beats.beat(0, 5, phase)
    with Watchdog(run, beats, timeout_s=0.2, node_rank=0, attempt=lambda: 1):
        assert worker.wait(timeout=60) == -signal.SIGKILL
    assert time.monotonic() - start > 1.0  # longer than between steps
    found = diagnose.first_failure(run, 1)
    assert found["kind"] == "hang"
    assert found["message"].startswith(f"{phase}, no progress for ")
    assert "stuck_here" in found["traceback"]


def test_before_the_first_step_there_is_more_patience_and_torch_has_more_than_the_watchdog():
    assert heartbeats.patience_s(600, TRAINING) == 600
    assert heartbeats.patience_s(600, JOINING) == 1800
    assert heartbeats.patience_s(2, BUILDING) == heartbeats.START_LEAST_S
    for hang_timeout_s in (2, 600, 7200):
        longest = max(heartbeats.patience_s(hang_timeout_s, phase) for phase in heartbeats.PHASES)
        assert heartbeats.group_timeout_s(hang_timeout_s) > longest + watchdog.DUMP_S
    assert heartbeats.group_timeout_s(None) > 3600


@pytest.mark.parametrize(
    ("phase", "age_s", "waits"),
    [(STARTING, 31.0, False), (MEETING, 0.5, True), (MEASURING, 0.1, True), (MEETING, 31.0, False)],
)
def test_before_there_is_a_group_a_worker_that_says_that_it_lives_is_not_the_one_that_hangs(
    run, worker, monkeypatch, phase, age_s, waits
):
    monkeypatch.setattr(watchdog, "DUMP_S", 0.0)
    Watchdog(run, Heartbeats(1), timeout_s=1.0, node_rank=0, attempt=lambda: 1)._end(
        [Beat(age_s=age_s, pid=worker.pid, rank=5, phase=phase)]
    )
    assert json.loads(run.rank_error(1, 5).read_text())["waiting"] == waits


TRAINS = "/w/launcher/engine/trainer.py, /w/launcher/engine/worker.py"
STEPS = f"/w/launcher/engine/train_step.py, {TRAINS}"


@pytest.mark.parametrize(
    ("stack", "waits"),
    [
        (f"/v/torch/autograd/graph.py, /w/launcher/engine/micro_batch.py, {STEPS}", True),
        (f"/w/launcher/engine/distributed.py, {TRAINS}", True),
        # On CUDA: the flags of an earlier step, the sums of a window, an optimizer that asks the scaler, validation.
        (f"/v/torch/cuda/streams.py, /w/launcher/engine/device.py, /w/launcher/engine/non_finite.py, {TRAINS}", True),
        (f"/w/launcher/engine/metrics.py, {TRAINS}", True),
        (f"/v/torch/amp/grad_scaler.py, {STEPS}", True),
        (f"/v/torch/functional.py, /v/launcher/engine/metrics.py, {TRAINS}", True),
        # What the others wait for.
        (f"/v/torch/utils/data/dataloader.py, {TRAINS}", False),
        (f"/v/PIL/Image.py, /w/launcher/engine/data.py, {TRAINS}", False),
        (f"/v/torch/nn/functional.py, /v/torch/nn/modules/conv.py, /w/launcher/engine/micro_batch.py, {STEPS}", False),
        (f"/w/launcher/engine/train_step.py, /v/torch/autograd/graph.py, {TRAINS}", False),
    ],
)
def test_a_worker_waits_for_others_if_its_innermost_call_is_a_collective_or_the_gpu(
    run, worker, monkeypatch, stack, waits
):
    monkeypatch.setattr(watchdog, "DUMP_S", 0.0)
    frames = "".join(f'  File "{file}", line 8 in x\n' for file in stack.split(", "))
    other = 'junk\nThread 0x1 (most recent call first):\n  File "other.py", line 1 in x\n\n'
    run.rank_log(1, 0).write_text(f"{other}Current thread 0x2 (most recent call first):\n{frames}")
    Watchdog(run, Heartbeats(1), timeout_s=1.0, node_rank=0, attempt=lambda: 1)._end(
        [Beat(age_s=2.0, pid=worker.pid, rank=0)]
    )
    error = json.loads(run.rank_error(1, 0).read_text())
    assert error["waiting"] == waits
    assert error["traceback"].count("\n") + 1 == len(stack.split(", "))


def test_without_a_log_there_is_no_stack(run):
    assert watchdog._last_stack(run.rank_log(1, 1)) == []


def test_the_stack_is_the_main_threads_whichever_took_the_signal(run):
    """Where a worker was stopped it may be one of gloo's, which has no stack of Python's."""
    frame = '  File "{}.py", line 8 in x'
    threads = [f"Thread 0x{number} (most recent call first):\n{frame.format(number)}\n" for number in (3, 2, 1)]
    for current in (None, *range(3)):
        said = [f"Current thread{text[6:]}" if place == current else text for place, text in enumerate(threads)]
        run.rank_log(1, 0).write_text("junk\n" + "\n".join(said))
        assert watchdog._last_stack(run.rank_log(1, 0)) == [frame.format(1)]
