"""TensorBoard's event files, read by its own reader."""

from __future__ import annotations

import os

import pytest

from launcher.tracking.records import FACTS
from tests.tracking.hand_made import VAL, event_rows, finish, keep_validation, make_run, track, train

pytest.importorskip("tensorboard", reason="an extra: pip install 'finetune-launcher[tensorboard]'")


def test_event_files_have_a_run_across_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(tmp_path, "disabled")
    train(run, 10, 20)
    assert track(run, "tensorboard") == []
    train(run, 20, 30, attempt=2)
    keep_validation(run, tmp_path / os.fsdecode(b"photo\xff.jpg"))
    run.append_event(FACTS, commit="0123456789ab", torch="2.9")
    run.append_metrics(**VAL)
    run.append_metrics(**VAL | {"step": 30})
    best = {"metric": "val/top1", "value": 0.5, "epoch": 0, "step": 30}
    finish(run, best=best)
    assert track(run, "tensorboard") == []
    rows = event_rows(run)
    assert [(step, value) for step, tag, value in rows if tag == "train/loss"] == [(10, 2.5), (20, 2.5), (30, 2.5)]
    assert {(step, value) for step, tag, value in rows if tag == "val/top1"} == {(20, 0.5), (30, 0.5)}
    assert {tag for _, tag, _ in rows} >= {"train/lr/head", "train/grad_norm", "train/data_wait", "epoch"}
    shown = EventAccumulator(str(run.sink_folder("tensorboard"))).Reload()
    (text,) = shown.Tensors("recipe")
    assert b"batch:" in text.tensor_proto.string_val[0]
    assert b"commit: 0123456789ab" in shown.Tensors("facts")[0].tensor_proto.string_val[0]
    (mistakes,) = shown.Tensors("val/mistakes")
    assert mistakes.step == VAL["step"]
    assert rb"photo\udcff.jpg: a, answered b 0.75" in mistakes.tensor_proto.string_val[0]
    (picture,) = shown.Images("val/mistakes/1")
    assert (picture.step, picture.width, picture.height) == (VAL["step"], 112, 75)
    assert b"val/top1 0.5000 (epoch 1" in shown.Tensors("best")[0].tensor_proto.string_val[0]
