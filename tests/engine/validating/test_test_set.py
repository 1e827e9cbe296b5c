"""A stop while the test set is measured: the checkpoints stay as they are, and it is measured after a resume."""

from __future__ import annotations

import hashlib
import shutil

import pytest

from launcher.engine.checkpoints import checkpoint
from launcher.engine.validating import test_set


@pytest.mark.parametrize("stopped", [False, True])
def test_the_best_checkpoint_is_measured_and_no_checkpoint_changes(
    stopped, make_run, engine, one_rank, photos, tmp_path, monkeypatch
):
    place = shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(place / "val", place / "test")
    settings = {"epochs": 2, "early_stopping": {"metric": "val/top1", "mode": "max", "patience": None}}
    run = make_run(data={"path": str(place), "test": "test"}, train=settings, batch={"size": 8})
    begun, told, measure = [], [], test_set.measure

    def measuring(parts, best, validation, recorder, **options):
        begun.append({file: hashlib.sha256(file.read_bytes()).digest() for file in run.checkpoints.glob("*/*")})
        recorder.has_tested = lambda split, best: bool(told)
        recorder.tested = lambda split, best, values: told.append((best, values))
        measure(parts, best, validation, recorder, **options)

    monkeypatch.setattr(test_set, "measure", measuring)
    found = engine.train(run, stop=lambda: bool(begun) and stopped)
    assert found.outcome == ("preempted" if stopped else "completed")
    assert len(told) == (not stopped)
    assert {file: hashlib.sha256(file.read_bytes()).digest() for file in run.checkpoints.glob("*/*")} == begun[0]
    if stopped:
        assert engine.train(run).outcome == "completed"
    assert engine.train(run).outcome == "completed"  # once more, and it is not measured again
    ((best, values),) = told
    validated = next(line for line in found.lines if line["split"] == "val" and line["step"] == best["step"])
    assert values["confusion"] == validated["confusion"]
    of_best = checkpoint.load(run.checkpoint(best["step"])).best_weights
    if not stopped:
        assert engine.identical(found.state, of_best)
