"""TensorBoard's event files, read by its own reader."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

from launcher.tracking.records import FACTS
from tests.tracking.hand_made import (
    VAL,
    event_rows,
    finish,
    keep_batch,
    keep_validation,
    load,
    make_run,
    show,
    track,
    train,
)

pytest.importorskip("tensorboard", reason="an extra: pip install 'finetune-launcher[tensorboard]'")


def test_answers_to_the_same_images_change_and_the_first_batch_comes_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(tmp_path, "disabled")
    keep_batch(run)
    train(run, 10)
    run.append_metrics(**VAL | show(run, tmp_path / "photo.jpg", "b", "b"))
    load(run, 0, 50.0, cpu=0.5)
    assert track(run, "tensorboard") == []
    train(run, 30)
    later = show(run, tmp_path / "photo.jpg", "a", "b")
    later["examples"][0]["confidence"] = None  # of weights that are no numbers
    run.append_metrics(**VAL | {"step": 40} | later)
    assert track(run, "tensorboard") == []
    shown = EventAccumulator(str(run.sink_folder("tensorboard"))).Reload()
    (batch,) = shown.Images("train/batch")
    assert batch.step == 10
    first, second = shown.Images("val/examples")
    assert (first.step, second.step) == (20, 40)
    assert first.encoded_image_string != second.encoded_image_string
    texts = [found.tensor_proto.string_val[0] for found in shown.Tensors("val/examples")]
    assert [b"answered b" in texts[0], b"photo.jpg: a, answered a no number" in texts[1]] == [True, True]
    assert [(step, value) for step, tag, value in event_rows(run) if tag == "node-0/cpu"] == [(10, 0.5)]


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
    for tag in ("val/roc", "val/pr"):
        (curve,) = shown.Images(tag)
        assert (curve.step, curve.width, curve.height) == (VAL["step"], 400, 400)
        with Image.open(io.BytesIO(curve.encoded_image_string)) as drawn:
            assert len(drawn.convert("RGB").getcolors()) > 3  # axes, text and lines
    plane = shown.Tensors("val/pr/b")[0].tensor_proto
    hits, wrong, neither, missed, precision, recall = np.reshape(plane.float_val, (6, 3))
    assert (recall.tolist(), precision.tolist()) == ([1.0, 0.5, 0.0], [0.5, 1.0, 1.0])
    assert (hits.tolist(), missed.tolist()) == ([4, 2, 0], [0, 2, 4])
    assert (wrong.tolist(), neither.tolist()) == ([4, 0, 0], [2, 6, 6])
    assert "pr_curves" in shown.summary_metadata["val/pr/b"].plugin_data.plugin_name
    assert b"val/top1 0.5000 (epoch 1" in shown.Tensors("best")[0].tensor_proto.string_val[0]
