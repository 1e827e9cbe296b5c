"""What rank 0 says to the person at the terminal."""

from __future__ import annotations

import io
import json

import pytest

from launcher.engine.listeners.recorder import Recorder
from launcher.recipe.schema import Recipe
from launcher.runs.run_dir import RunDir
from launcher.system import phases
from launcher.tracking.records import FACTS, Feed

VALUES = {"samples": 40, "loss": 1.0, "top1": 0.5, "top5": 1.0, "f1": 0.4}


@pytest.fixture
def recorder(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    return Recorder(run, Recipe(), attempt=1, console=io.StringIO(), num_steps=10)


def told_of(run, num_classes):
    """What a tracker is told of the validation."""
    run.append_event(FACTS, num_classes=num_classes)
    (record,) = Feed(run, Recipe()).new()
    return record.values


@pytest.mark.parametrize(("num_classes", "shown"), [(2, False), (5, False), (6, True)])
def test_top_5_of_five_classes_or_fewer_is_recorded_and_not_shown(recorder, num_classes, shown):
    recorder.classes(num_classes, {})
    recorder.validation(epoch=0, step=5, values=VALUES, best=True)
    assert ("top5" in recorder._console.getvalue()) == shown
    assert ("val/top5" in told_of(recorder._run, num_classes)) == shown
    assert json.loads(recorder._run.metrics.read_text())["top5"] == 1.0
    assert "top1 0.5000" in recorder._console.getvalue()


def test_rare_classes_are_named(recorder):
    recorder.classes(14, {f"class {index}": index for index in range(12)})
    assert "warning: few training images of class 0 (0), class 1 (1)," in recorder._console.getvalue()
    (event,) = map(json.loads, recorder._run.events.read_text().splitlines())
    assert (event["kind"], event["num_classes"], len(event["classes"])) == ("rare_classes", 12, 10)


def test_without_rare_classes_nothing_is_said(recorder):
    recorder.classes(3, {})
    assert recorder._console.getvalue() == ""
    assert not recorder._run.events.exists()


def test_a_test_set_of_one_class_has_no_auroc_and_the_run_goes_on(tmp_path):
    run, best = RunDir(tmp_path / "run"), {"step": 5, "epoch": 0, "weights": None}
    run.create()
    recorder = Recorder(run, Recipe(), attempt=1, console=io.StringIO(), num_steps=10)
    recorder.tested("test", best, VALUES | {"auroc": float("nan"), "loss": float("inf")})
    status = run.read_status()["test"]
    assert (status["auroc"], status["loss"], status["top1"]) == (None, None, 0.5)
    assert recorder.has_tested("test", best)
    assert "test  loss inf  top1 0.5000" in recorder._console.getvalue()
    recorder.end(outcome="completed")
    assert run.read_status()["state"] == "completed"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def on_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    run = RunDir(tmp_path / "run")
    run.create()
    made = []

    def make(**options):
        made.append(Recorder(run, Recipe(), attempt=1, console=Terminal(), num_steps=200, **options))
        return made[-1]

    yield make
    for recorder in made:
        recorder.close()


def test_the_bar_counts_the_steps_of_the_epoch_and_shows_the_part_of_the_run(on_terminal):
    recorder = on_terminal()  # 20 epochs of 10 steps
    recorder.resumed(epoch=4, step=43, offset=30, num_steps=200)
    recorder.progress(epoch=4, step=44, part=0.4)
    recorder.step(epoch=4, step=44, values=VALUES | {"images_per_s": 12.0, "lr": 0.1})
    recorder._progress.refresh()
    shown = recorder._console.getvalue().splitlines()[-1]
    assert "epoch 5/20  step 4/10" in shown
    assert "22%" in shown
    assert "loss 1.0000" in shown


def test_between_steps_the_bar_shows_what_is_done_instead(on_terminal):
    recorder = on_terminal()
    recorder.progress(epoch=4, step=44, part=0.4)

    def shown():
        recorder._progress.refresh()
        return recorder._console.getvalue().splitlines()[-1]

    with phases.during("validating") as show:
        assert "validating" in shown()
        show(320, 1000)
        assert "validating 320 of 1,000" in shown()
        assert "step 4/10" not in shown()
    recorder.progress(epoch=5, step=45, part=0.1)
    assert "epoch 6/20  step 1/10" in shown()
    recorder.close()
    phases.at("validating")  # nobody tells any more


def test_a_debugger_has_the_terminal_for_itself(on_terminal):
    recorder = on_terminal(bar=False)
    recorder.step(epoch=0, step=1, values=VALUES | {"images_per_s": 12.0, "lr": 0.1})
    assert recorder._progress is None
    assert recorder._console.getvalue() == "epoch 1/20  step 1/200  loss 1.0000  top1 0.500  12 images/s  lr 0.1\n"


def test_the_end_of_an_epoch_has_the_means_over_its_images(recorder):
    recorder.epoch(epoch=1, values=VALUES | {"images_per_s": 12.0})
    assert recorder._console.getvalue() == "epoch 2/20  train  loss 1.0000  top1 0.500  12 images/s\n"


def test_the_ranks_times_are_written_seldom_and_at_once_where_another_rank_is_named(recorder, monkeypatch):
    monkeypatch.setattr("launcher.engine.listeners.recorder.RANKS_EVERY_S", 3600.0)

    def written(step, rank, *, is_slow):
        recorder.ranks({"step": step, "slowest": {"rank": rank, "is_slow": is_slow}})
        return json.loads(recorder._run.rank_times.read_text())["step"]

    found = [(0, False), (1, False), (1, True), (1, True), (2, True), (2, True), (0, False), (1, False)]
    assert [written(step, rank, is_slow=slow) for step, (rank, slow) in enumerate(found)] == [0, 0, 2, 2, 4, 4, 6, 6]
