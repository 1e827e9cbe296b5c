"""A node writes down now and then what it does, less often the longer the file is."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from launcher.node import load_log
from launcher.node.load_log import DOUBLE_BYTES, EVERY_S, LoadLog, every_s
from launcher.plan.launch_plan import LaunchPlan
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(load_log, "FIRST_S", 0.05)
    monkeypatch.setattr(load_log, "EVERY_S", 0.05)


def test_each_node_has_a_file_of_its_own(tmp_path, quick):
    run = RunDir(tmp_path / "run")
    run.create()
    plan = LaunchPlan(run_id="run", run_dir=str(run.path), nodes=2, node_rank=1)
    with LoadLog(run, plan):
        until = time.monotonic() + 60
        while len(lines := list(read_jsonl(run.node_load(1)))) < 3:
            assert time.monotonic() < until
            time.sleep(0.02)
    assert [file.name for file in run.node_load(1).parent.iterdir()] == ["node-1.jsonl"]
    for line in lines:
        assert 0 <= line["cpu"] <= 1
        assert line["memory_mb"] > 0
        assert line["free_mb"] > 0
        assert "gpus" not in line
    assert lines[0]["time"] < lines[1]["time"] < lines[2]["time"]


def test_what_fails_ends_nothing_and_is_said_once(tmp_path, quick, monkeypatch, capsys):
    run = RunDir(tmp_path / "run")
    run.create()
    failures = [OSError(errno.ENOSPC, "No space left on device"), KeyError("MemAvailable")]
    written = threading.Event()

    def failing(real, error):
        def call(*arguments, **options):
            if error in failures:
                failures.remove(error)
                raise error
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(load_log, "Load", failing(load_log.Load, failures[1]))
    monkeypatch.setattr(load_log, "append_jsonl", failing(load_log.append_jsonl, failures[0]))
    monkeypatch.setattr(load_log, "every_s", lambda size: written.set() or 0.05)
    with LoadLog(run, LaunchPlan(run_id="run")):
        assert written.wait(60)
    assert failures == []
    assert capsys.readouterr().out == (
        "node-0.jsonl: what this node does is not written down (KeyError: 'MemAvailable'); trying again\n"
    )


def test_the_longer_the_file_the_rarer_the_lines():
    assert every_s(0) == every_s(DOUBLE_BYTES - 1) == EVERY_S
    assert every_s(3 * DOUBLE_BYTES) == 8 * EVERY_S
