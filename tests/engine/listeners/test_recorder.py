"""What rank 0 says to the person at the terminal."""

from __future__ import annotations

import io
import json

import pytest

from launcher.engine.listeners.recorder import Recorder
from launcher.recipe.schema import Recipe
from launcher.runs.run_dir import RunDir

VALUES = {"samples": 40, "loss": 1.0, "top1": 0.5, "top5": 1.0, "f1": 0.4}


@pytest.fixture
def recorder(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    return Recorder(run, Recipe(), attempt=1, console=io.StringIO(), num_steps=10, tracked=False)


@pytest.mark.parametrize(("num_classes", "shown"), [(2, False), (5, False), (6, True)])
def test_top_5_of_five_classes_or_fewer_is_recorded_and_not_shown(recorder, num_classes, shown):
    told = []
    recorder._tracker = type("Tracker", (), {"log": staticmethod(told.append)})()
    recorder.classes(num_classes, {})
    recorder.validation(epoch=0, step=5, values=VALUES, best=True)
    assert ("top5" in recorder._console.getvalue()) == shown
    assert told[0]["top5"] == (1.0 if shown else None)
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
