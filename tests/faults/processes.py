"""Faults of processes: killed, told to stop, hung."""

from __future__ import annotations

import contextlib
import signal
import time

import psutil

from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from tests.faults import records
from tests.faults.bench import EPOCHS, Bench, Launched, Outcome, state_of, step, written
from tests.faults.slowly import SLOWLY

AT = 17
"""A step in the middle of the second of three epochs; faults come after it."""


def begin(bench: Bench, name: str, *changes: str, at: int = AT) -> tuple[Launched, RunDir]:
    """Start a run and wait until it is well under way, with a checkpoint."""
    run = RunDir(bench.place(name) / "run")
    launched = bench.launch(run.path, SLOWLY, *changes)
    launched.until(lambda: step(run) >= at and written(run), f"step {at}")
    return launched, run


def rank(bench: Bench) -> Outcome:
    launched, run = begin(bench, "rank")
    launched.workers(run)[1].kill()
    launched.ends(0)
    assert [e["attempt"] for e in events(run, "attempt_started")] == [1, 2]
    assert [e["cause"] for e in events(run, "attempt_ended")] == ["lost_worker"]
    lost = records.went_on(run, bench.undisturbed(), epochs=EPOCHS)
    return Outcome(happened="the workers were started again; the same bits", steps_lost=lost)


def loader(bench: Bench) -> Outcome:
    launched, run = begin(bench, "loader", "data.workers=1")

    def is_missed() -> bool:
        """One that had nothing left to do is not; between two epochs there is none."""
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = launched.workers(run)[1:]
            for one in [] if events(run, "attempt_ended") else workers:
                for loader in one.children():
                    loader.kill()
        return bool(events(run, "attempt_ended"))

    launched.until(is_missed, "a loader process is missed")
    launched.ends(0)
    assert [e["attempt"] for e in events(run, "attempt_started")] == [1, 2]
    lost = records.went_on(run, bench.undisturbed(), epochs=EPOCHS)
    return Outcome(happened="the workers were started again; the same bits", steps_lost=lost)


def supervisor(bench: Bench) -> Outcome:
    launched, run = begin(bench, "supervisor")
    launched.process.kill()
    start = time.monotonic()
    assert launched.leaves_nobody(), f"outlived by {launched.session()}"
    seconds = time.monotonic() - start
    stopped_at = state_of(run)["step"]
    bench.resume(run.path).ends(0)
    assert [e["step"] for e in events(run, "resumed")] == [stopped_at]
    lost = records.went_on(run, bench.undisturbed(), epochs=EPOCHS)
    assert lost == 0, f"{lost} steps lost"
    return Outcome(
        happened=f"the workers saved and were gone after {seconds:.1f} s; resumed: the same bits", steps_lost=lost
    )


def everything(bench: Bench) -> Outcome:
    launched, run = begin(bench, "everything")
    launched.signal(signal.SIGKILL)
    assert launched.leaves_nobody(), f"outlived by {launched.session()}"
    bench.resume(run.path).ends(0)
    lost = records.went_on(run, bench.undisturbed(), epochs=EPOCHS)
    return Outcome(happened="resumed from the last checkpoint: the same bits", steps_lost=lost)


def sigterm(bench: Bench) -> Outcome:
    launched, run = begin(bench, "sigterm")
    launched.process.terminate()
    return _stopped(bench, launched, run)


def ctrl_c(bench: Bench) -> Outcome:
    launched, run = begin(bench, "ctrl-c")
    launched.signal(signal.SIGINT)
    return _stopped(bench, launched, run)


def _stopped(bench: Bench, launched: Launched, run: RunDir) -> Outcome:
    output = launched.ends(75)
    assert "launch resume" in output
    assert run.read_status()["state"] == "preempted"
    stopped_at = state_of(run)["step"]
    assert AT <= stopped_at < 36
    bench.resume(run.path).ends(0)
    assert [e["step"] for e in events(run, "resumed")] == [stopped_at]
    lost = records.went_on(run, bench.undisturbed(), epochs=EPOCHS)
    assert lost == 0, f"{lost} steps lost"
    return Outcome(happened="saved, exit 75, nobody left; resumed: the same bits", steps_lost=lost)


def ctrl_c_twice(bench: Bench) -> Outcome:
    launched, run = begin(bench, "ctrl-c-twice")
    for worker in launched.workers(run):
        worker.suspend()  # so that they cannot leave by themselves
    launched.signal(signal.SIGINT)
    launched.until(lambda: events(run, "signal"), "the first signal")
    start = time.monotonic()
    launched.signal(signal.SIGINT)
    launched.ends(75)
    seconds = time.monotonic() - start
    bench.resume(run.path).ends(0)
    lost = records.went_on(run, bench.undisturbed(), epochs=EPOCHS)
    return Outcome(happened=f"exit 75 after {seconds:.1f} s, nobody left; resumed: the same bits", steps_lost=lost)


def hang(bench: Bench) -> Outcome:
    launched, run = begin(bench, "hang", "train.hang_timeout_s=15")
    launched.workers(run)[1].suspend()
    launched.ends(0)
    ended = [(e["cause"], e["message"]) for e in events(run, "attempt_ended")]
    assert [cause for cause, _ in ended] == ["hang"], ended
    for number in (0, 1):
        log = run.rank_log(1, number).read_text()
        assert "most recent call first" in log, f"no stack in the log of rank {number}"
    lost = records.went_on(run, bench.undisturbed(), epochs=EPOCHS)
    return Outcome(
        happened="found; the stacks of both ranks are in their logs; started again: the same bits", steps_lost=lost
    )
