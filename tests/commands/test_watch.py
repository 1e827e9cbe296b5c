"""`launch watch`: what it makes of a run's files, as they grow."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from launcher.backends import living
from launcher.commands import watch, watch_screen
from launcher.commands.watch import line
from launcher.commands.watched import View, Watched
from launcher.errors import UsageError
from launcher.runs import progress as runs_progress
from launcher.runs.progress import MOST_POINTS, Curve, Progress
from launcher.runs.whereabouts import JobState

BEST = {"metric": "val/top1", "value": 0.75, "epoch": 1, "step": 20}
NOW = time.time()


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Stands still, for what is left of the time depends on it."""
    monkeypatch.setattr(runs_progress.time, "time", lambda: NOW)


@pytest.fixture
def training(make_run):
    """A run after 25 of 50 steps; a step takes two seconds."""
    status = {"attempt": 2, "epoch": 2, "epochs": 5, "step": 25, "num_steps": 50, "best": BEST}
    run = make_run("a", state="running", **status)
    for step in range(5, 30, 5):
        values = {"loss": 2.0 - step / 20, "images_per_s": 32.0, "lr": 0.01, "data_wait": 0.25, "per_class": {"x": {}}}
        run.append_metrics(time=NOW - 2 * (25 - step), split="train", epoch=(step - 1) // 10, step=step, **values)
        if step % 10 == 0:
            run.append_metrics(time=NOW, split="val", epoch=step // 10 - 1, step=step, loss=1.0, top1=0.5 + step / 80)
    run.append_event("checkpoint", step=20)
    return run


def shown(view, width):
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(watch_screen.box(view, width))
    return console.file.getvalue()


def test_a_run_that_trains(training):
    snapshot = Progress(training).look()
    assert (snapshot.state, snapshot.epoch, snapshot.epochs, snapshot.part) == ("running", 3, 5, 0.5)
    assert snapshot.seconds_left == pytest.approx(50, abs=5)
    assert snapshot.losses == [1.75, 1.5, 1.25, 1.0, 0.75]
    assert snapshot.metrics == [0.625, 0.75]
    assert snapshot.last_event["kind"] == "checkpoint"
    text = line(View(snapshot=snapshot, job=None, shown=snapshot.state))
    assert text.startswith(str(training))
    assert "epoch 3/5  step 25/50  loss 0.75  images_per_s 32  best val/top1 0.7500" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_screen_fits(training, width):
    found = shown(Watched(training).look(), width)
    assert max(map(len, found.splitlines())) <= width
    assert "running" in found
    assert "attempt 2" in found
    assert "50% epoch 3/5  step 25/50" in found
    assert "loss 0.7500" in found
    assert "█▆▅▃▁" in found
    assert "val/top1 0.7500" in found
    if width > 60:
        assert "best 0.7500 in epoch 2" in found
        assert "25% waiting for data" in found
        assert "s left" in found


def test_what_is_appended_is_read_once_and_half_a_line_when_it_is_whole(training):
    progress = Progress(training)
    assert len(progress.look().losses) == 5
    record = json.dumps({"time": NOW + 10, "split": "train", "epoch": 2, "step": 30, "loss": 0.5})
    with training.metrics.open("a") as file:
        file.write(record[:20])
        file.flush()
        assert len(progress.look().losses) == 5
        file.write(record[20:] + "\nno json\n")
    snapshot = progress.look()
    assert snapshot.losses[-2:] == [0.75, 0.5]
    assert snapshot.step == 30
    assert progress.look().losses == snapshot.losses


def test_a_run_that_went_back_to_a_checkpoint_has_no_pace_from_before(training):
    progress = Progress(training)
    training.append_metrics(time=NOW + 500, split="train", epoch=2, step=21, loss=0.7)
    assert progress.look().seconds_left is None
    training.append_metrics(time=NOW + 501, split="train", epoch=2, step=22, loss=0.7)
    assert progress.look().seconds_left == pytest.approx(28 + 501, abs=10)


def test_a_run_without_files_yet(make_run):
    run = make_run("new", state="pending")
    run.events.unlink(missing_ok=True)
    view = Watched(run).look()
    assert line(view).split()[-1] == "pending"
    assert "pending" in shown(view, 80)


def test_a_job_that_waits_says_why_and_when_it_is_to_start(training, monkeypatch):
    job = JobState(job_id="7", state="PENDING", reason="Resources", expected="2026-12-24T18:00:00")
    monkeypatch.setattr(living, "job_state", lambda _: job)
    view = Watched(training).look()
    assert "queued (Resources)" in line(view)
    assert "job 7  expected to start 2026-12-24T18:00:00" in shown(view, 100)


def test_numbers_that_are_not_finite_leave_a_gap():
    assert watch_screen.sparkline([1.0, float("nan"), 3.0, float("inf")], 8) == "▁ █ "
    assert watch_screen.sparkline([1.0, 1.0], 8) == "▁▁"
    assert watch_screen.sparkline([], 8) == ""
    assert len(watch_screen.sparkline([float(n) for n in range(1000)], 30)) <= 30


def test_a_long_curve_is_thinned_out_evenly():
    curve = Curve()
    for number in range(100_000):
        curve.add(float(number))
    assert len(curve.values) <= MOST_POINTS
    assert {b - a for a, b in zip(curve.values, curve.values[1:], strict=False)} == {curve.values[1]}
    assert curve.values[-1] > 99_000


def test_off_a_terminal_a_line_for_each_change_until_the_run_ends(training, capsys, monkeypatch):
    changes = [
        lambda: None,
        lambda: training.append_metrics(time=NOW, split="train", epoch=2, step=30, loss=0.5, images_per_s=30.0),
        lambda: training.update_status(state="completed", step=50, epoch=5),
    ]
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=lambda _: changes.pop(0)()))
    assert watch.main([str(training)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "step 25/50" in lines[0]
    assert "step 30/50  loss 0.5" in lines[1]
    assert "completed  epoch 5/5  step 50/50" in lines[2]


@pytest.mark.parametrize(("is_slow", "attempt"), [(True, 2), (False, 2), (True, 9)])
def test_the_slowest_of_8192_ranks_is_named_with_its_cause(training, is_slow, attempt, capsys):
    slowest = {"rank": 4711, "cause": "loader", "behind": 0.43, "is_slow": is_slow}
    each = {name: [0.1] * 8192 for name in ("step_s", "compute_s", "wait_s")}
    training.rank_times.write_text(
        json.dumps({"time": NOW, "attempt": attempt, "step": 25, "slowest": slowest, **each})
    )
    named = "rank 4711 is 43% slower than the median rank, by its loader"
    assert watch.main([str(training), "--once"]) == 0
    assert (named in capsys.readouterr().out) == (is_slow and attempt == 2)
    assert (named in shown(Watched(training).look(), 100)) == (is_slow and attempt == 2)


def test_a_folder_of_runs_is_watched_and_json_is_for_programs(training, make_run, tmp_path, capsys):
    make_run("b", state="completed")
    assert watch.main([str(tmp_path / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["state"] for one in found} == {"running", "completed"}
    assert {one["part"] for one in found} == {0.5, None}
    with pytest.raises(UsageError):
        watch.main([str(tmp_path / "nothing")])


def test_a_run_of_many_ranks_and_steps_needs_little_memory_and_no_torch(training):
    training.plan.write_text(json.dumps(json.loads(training.plan.read_text()) | {"nodes": 1024, "procs": 8}))
    record = json.dumps({"time": NOW, "split": "train", "epoch": 2, "step": 25, "loss": 0.5, "images_per_s": 30.0})
    with training.metrics.open("a") as file:
        file.writelines(record + "\n" for _ in range(200_000))
    code = (
        "import re, sys; from launcher.cli import main; code = main(); status = open('/proc/self/status').read(); "
        "print(code, 'torch' in sys.modules, re.search('VmHWM: *([0-9]+)', status.replace(chr(9), ' '))[1])"
    )
    command = [sys.executable, "-c", code, "watch", "--once", str(training)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    code, has_torch, peak_kb = done.stdout.splitlines()[-1].split()
    assert (code, has_torch) == ("0", "False")
    assert int(peak_kb) < 100_000
