"""Trackers beside a training: whatever becomes of them, training does not wait for them, and hears one line."""

from __future__ import annotations

import os
import signal
import time

import pytest

from launcher.recipe import load as recipes
from launcher.system.files import read_jsonl
from launcher.tracking import sink as sinks
from launcher.tracking import trackers
from launcher.tracking.place import Place, is_taken
from launcher.tracking.trackers import Trackers
from tests.tracking.hand_made import ENDED_S, KEY, event_rows, finish, make_run, rows_of, train, wait_until


def beside(run, said, **options):
    return trackers.beside(run, recipes.read_resolved(run.recipe), say=said.append, stop=lambda: False, **options)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a machine that is busy nothing is said of a wait, and nobody is given up for it."""
    for name in ("SILENT_S", "FINISH_S"):
        monkeypatch.setattr(trackers, name, ENDED_S)


@pytest.fixture
def no_process(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(trackers.subprocess, "Popen", fail)


@pytest.mark.parametrize(("mode", "variable"), [("disabled", ""), ("auto", "disabled")])
def test_disabled_starts_no_process_and_says_nothing(tmp_path, monkeypatch, no_process, mode, variable):
    monkeypatch.setenv("WANDB_MODE", variable)
    said = []
    with beside(make_run(tmp_path, mode), said) as found:
        assert not found.alive
    assert said == []


def test_off_without_a_key_starts_no_process_and_says_one_line(tmp_path, no_process):
    said = []
    with beside(make_run(tmp_path, "auto"), said):
        pass
    (line,) = said
    assert "wandb: off: no API key" in line


def test_what_is_not_installed_is_said_and_the_rest_goes_on(tmp_path, no_process, monkeypatch):
    monkeypatch.setattr(sinks, "find_spec", lambda _: None)
    said = []
    with beside(make_run(tmp_path, "disabled", backends=["wandb", "tensorboard", "mlflow"]), said):
        pass
    assert [line.partition(":")[0] for line in said] == ["tensorboard", "mlflow"]
    assert "pip install 'finetune-launcher[tensorboard]'" in said[0]


@pytest.mark.slow
def test_a_tracker_that_is_killed_is_started_again_and_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    run, said = make_run(tmp_path, "disabled", backends=["tensorboard"]), []
    with beside(run, said) as found:
        for start in (1, 2):
            train(run, start)
            wait_until(lambda: len(list(run.sink_folder("tensorboard").glob("*"))) == 1)
            pid = found._trackers[0]._process.pid
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: found._trackers[0]._process.pid != pid)
        train(run, 3)
        finish(run)
    assert len(said) == 2
    assert "tensorboard: its tracker was killed (SIGKILL); it is started again" in said[0]
    assert [step for step, tag, _ in event_rows(run) if tag == "train/loss"] == [1, 2, 3]


@pytest.mark.slow
def test_one_that_hangs_is_given_up_at_the_end_and_goes_on_later(tmp_path):
    run, said = make_run(tmp_path), []
    train(run, 1, 2)
    found = Trackers(run, ["wandb"], say=said.append, beside=True)
    with found:
        wait_until(lambda: list(run.wandb.glob("offline-run-*")))
        os.kill(found._trackers[0]._process.pid, signal.SIGSTOP)
        finish(run)
        found.finish(0.5)
    assert not found.alive
    (line,) = said
    assert "not done after" in line
    assert f"`launch track {run} --wandb` sends the rest" in line
    with Trackers(run, ["wandb"], say=said.append, beside=False) as later:
        later.finish(ENDED_S)
    assert (said[1:], later.codes) == ([], [0])
    assert [row["step"] for row in rows_of(run)] == [1, 2]


@pytest.mark.slow
def test_a_server_that_hangs_is_given_up_at_the_end(tmp_path, server, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run, said = make_run(tmp_path, "auto"), []
    train(run, 1)
    with beside(run, said) as found:
        wait_until(lambda: list(run.wandb.glob("run-*")))
        found.finish(0.5)
    assert not found.alive
    assert len(said) == 1
    assert "given up" in said[0]
    (event,) = [event for event in read_jsonl(run.events) if event["kind"] == "wandb_unsynced"]
    assert event["reason"] == "given up at the end"


def test_after_a_stop_nothing_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "STOPPED_S", 0.2)
    run, said = make_run(tmp_path), []
    found = Trackers(run, ["wandb"], say=said.append, beside=True, stop=lambda: True)
    with found:
        pass  # it is still importing
    assert not found.alive
    assert "given up" in said[-1]


@pytest.mark.parametrize("taken", ["wandb", "wandb-offline"])
def test_exports_are_left_to_the_tracker_that_is_at_work(tmp_path, no_process, taken):
    run = make_run(tmp_path)
    pid = os.fork()
    if pid == 0:  # a lock keeps out other processes only
        with Place(run, taken):
            time.sleep(ENDED_S)
    try:
        wait_until(lambda: is_taken(run, taken))
        trackers.send_once(run, recipes.read_resolved(run.recipe), say=print, timeout_s=0.0)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
