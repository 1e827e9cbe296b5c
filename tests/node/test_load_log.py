"""A node writes down now and then what it does, less often the longer the file is."""

from __future__ import annotations

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


def test_a_disk_that_is_full_ends_nothing(tmp_path, quick, monkeypatch):
    run = RunDir(tmp_path / "gone" / "run")  # whose folder cannot be made
    tried = []
    monkeypatch.setattr(load_log, "every_s", lambda size: tried.append(size) or 0.05)
    with LoadLog(run, LaunchPlan(run_id="run")):
        time.sleep(0.3)
        run.path.mkdir(parents=True)
        until = time.monotonic() + 60
        while not tried:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_the_longer_the_file_the_rarer_the_lines():
    assert every_s(0) == every_s(DOUBLE_BYTES - 1) == EVERY_S
    assert every_s(3 * DOUBLE_BYTES) == 8 * EVERY_S
