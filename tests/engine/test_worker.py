"""A rank from its first line of log to its end, in a process of its own as torch's agent starts it."""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest

from launcher.engine import worker
from launcher.engine.schedule import Batching
from launcher.errors import EXIT_FAILED
from launcher.files import write_json_atomic
from launcher.run_dir import ATTEMPT_VARIABLE
from launcher.watchdog import Heartbeats

END_S = 30  # far more than it takes


@pytest.fixture
def start(monkeypatch):
    """Run the only worker of a run, as attempt 1; return its exit code, None where it does not end, and its beats."""

    def call(run):
        write_json_atomic(run.plan, {"run_id": "r", "device": "cpu", "tune": False})
        for name, value in {ATTEMPT_VARIABLE: "1", "OMP_NUM_THREADS": "1"}.items():
            monkeypatch.setenv(name, value)
        beats = Heartbeats(1)
        process = multiprocessing.get_context("fork").Process(target=worker.worker_main, args=(str(run.path), beats))
        process.start()
        process.join(END_S)
        code = process.exitcode
        process.kill()
        process.join()
        return code, beats

    return call


def test_a_rank_that_fails_alone_says_so_and_does_not_wait_for_its_peers(make_run, start, monkeypatch):
    """They sit in a collective that it will never join; NCCL waits for that when a process group is taken down."""

    def fail(_):
        print("the last line", end="")
        raise ValueError("a fault of one rank")

    monkeypatch.setattr(worker.Trainer, "run", fail)
    monkeypatch.setattr(worker.dist, "destroy_process_group", lambda: time.sleep(1000))
    run = make_run()
    code, beats = start(run)
    assert code == EXIT_FAILED
    assert beats.any_failed
    error = json.loads(run.rank_error(1, 0).read_text())
    assert (error["kind"], error["message"]) == ("bug", "a fault of one rank")
    log = run.rank_log(1, 0).read_text()
    assert "the last line" in log
    assert "ValueError: a fault of one rank" in log


def test_what_probes_took_is_not_laid_to_training(make_run, start, monkeypatch):
    """The kernel may kill some; kills are counted from when training begins."""
    kills = [5]

    def tune_rank(*_, **__):
        kills[0] += 2
        return {"threads": 1, "workers": 0}

    def agree(*_):
        return Batching.even(18, world_size=1, global_size=None, accumulate=1)

    monkeypatch.setattr(worker.host_memory, "num_kills", lambda: kills[0])
    monkeypatch.setattr(worker.autotune, "tune_rank", tune_rank)
    monkeypatch.setattr(worker.autotune, "agree", agree)
    code, beats = start(make_run(batch={"size": "auto"}))
    assert code == 0
    assert beats.kills_before == 7
