"""A rank from its first line of log to its end, in a process of its own as torch's agent starts it."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from launcher.engine import error_kinds, worker
from launcher.engine.loading.data_sets import open_data_sets
from launcher.engine.schedule import Batching
from launcher.errors import EXIT_FAILED, MachineError
from launcher.node import watchdog
from launcher.runs import diagnose, heartbeats
from launcher.runs.heartbeats import FIRST, TRAINING, Heartbeats
from launcher.runs.run_dir import ATTEMPT_VARIABLE
from launcher.system import phases
from launcher.system.files import write_json_atomic
from tests import ports

END_S = 150  # far more than it takes


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


def test_a_rank_that_hangs_before_its_first_step_is_found_and_the_one_that_waits_for_it_is_not_blamed(
    make_run, monkeypatch
):
    """Rank 1 lists its images for ever; rank 0 waits for it, and says that it lives."""

    def stuck_in_listing(run):
        if os.environ["RANK"] == "1":
            time.sleep(1000)
        return open_data_sets(run)

    monkeypatch.setattr(worker, "open_data_sets", stuck_in_listing)
    for name, value in {"POLL_S": 0.1, "DUMP_S": 1.0}.items():
        monkeypatch.setattr(watchdog, name, value)
    monkeypatch.setattr(heartbeats, "START_LEAST_S", 10.0)
    port = str(ports.free())
    run, fork, beats = make_run(), multiprocessing.get_context("fork"), Heartbeats(2)
    write_json_atomic(run.plan, {"run_id": "r", "device": "cpu", "tune": False})
    run.attempt_errors(1).mkdir(parents=True)

    def as_rank(rank):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), ATTEMPT_VARIABLE: "1", "OMP_NUM_THREADS": "1"}
        os.environ.update({**own, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        worker.worker_main(str(run.path), beats)

    ranks = [fork.Process(target=as_rank, args=(rank,)) for rank in (0, 1)]
    with watchdog.Watchdog(run, beats, timeout_s=0.5, node_rank=0, attempt=lambda: 1):
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(END_S)
    assert [process.exitcode for process in ranks] == [-signal.SIGKILL] * 2
    failure = diagnose.first_failure(run, 1)
    assert (failure["kind"], failure["rank"]) == ("hang", 1)
    assert failure["message"].startswith("starting, no progress for ")
    assert "stuck_in_listing" in failure["message"]
    waits = json.loads(run.rank_error(1, 0).read_text())
    assert waits["waiting"]
    assert waits["message"].startswith("meeting the other workers, no progress for ")


TORCH = Path(torch.__file__).parent / "nn/modules/module.py"
LOADER = """Traceback (most recent call last):
  File "{torch}", line 774, in reraise
    raise exception
ValueError: Caught ValueError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "{torch}", line 61, in fetch
  File "/home/me/mine.py", line 7, in __getitem__
ValueError: x
"""


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f'  File "{worker.__file__}", line 3, in train\n  File "{TORCH}", line 9, in forward\n', None),
        (f'  File "{os.__file__}", line 3, in open\n  File "<frozen importlib>", line 9, in x\n', None),
        (f'  File "{worker.__file__}", line 3, in train\n  File "/home/me/a.py", line 4, in loss\n', "/home/me/a.py:4"),
        (f'  File "/home/me/a.py", line 4, in loss\n  File "{TORCH}", line 9, in forward\n', "/home/me/a.py:4"),
        (LOADER.format(torch=TORCH), "/home/me/mine.py:7"),
    ],
)
def test_the_users_own_line_is_the_last_that_is_nobody_elses(text, place):
    assert error_kinds.last_own_line(text) == place


@pytest.mark.parametrize(
    ("error", "kind", "cure"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "environment", "ulimit -n"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "environment", "free memory"),
        (OSError(errno.EACCES, "Permission denied", "/a"), "environment", "may read"),
        (OSError(errno.ENOENT, "No such file or directory", "/a"), "environment", "is there, on every node"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/a"), "environment", "shorter path"),
        (OSError(errno.ESTALE, "Stale file handle", "/a"), "environment", "file system failed"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "full_disk", "free space"),
        (
            RuntimeError("unable to open shared memory object </torch_1> in read-write mode"),
            "environment",
            "--shm-size",
        ),
        (RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error. It"), "environment", "--shm-"),
        (RuntimeError("Too many open files. Communication with"), "environment", "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "environment", "ulimit -n"),
        (RuntimeError("can't start new thread"), "environment", "ulimit -u"),
        (MachineError("a batch is lost: OSError: AF_UNIX path too long"), "environment", "TMPDIR"),
        (ValueError("shapes"), "bug", "report it"),
    ],
)
def test_what_the_environment_lacks_is_no_bug_and_has_a_cure_of_its_own(error, kind, cure):
    assert error_kinds.error_kind(error) == kind
    told = diagnose.cure({"kind": kind, "message": str(error), "own_line": None})
    assert cure in told
    assert "your own code" not in told


def test_the_users_code_is_blamed_where_it_was_in_the_traceback():
    told = diagnose.cure({"kind": "bug", "message": "shapes", "own_line": "/home/me/mine.py:4"})
    assert told.startswith("look at /home/me/mine.py:4, the last line of your own code above")


def test_what_came_before_training_is_over_once_it_trains_also_where_a_block_put_it_back():
    output = io.StringIO()
    line = phases.Line(output, told_s=0.0)
    with phases.told_by(line):
        tell = worker._told(lambda _: None, output, line)
        tell(FIRST)
        with phases.during("keeping frozen features"):
            tell(TRAINING)
        assert line.phase == "first batch"
        tell(TRAINING)
        assert line.phase == ""
        with phases.during("validating"):
            tell(TRAINING)  # goes on
            assert line.phase == "validating"
        assert line.phase == ""
