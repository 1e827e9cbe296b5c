"""A tracker that is killed again and again sends each record once, and none is missing."""

from __future__ import annotations

import random
import time

import pytest

from tests.tracking.hand_made import (
    ENDED_S,
    VAL,
    event_rows,
    finish,
    keep_batch,
    load,
    make_run,
    read_record,
    rows_of,
    show,
    tracker,
    train,
)

pytest.importorskip("tensorboard", reason="an extra: pip install 'finetune-launcher[tensorboard]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
KILLS = 10


def files_of(run):
    return [{file.name for file in folder.glob("*")} for folder in (run.wandb, run.sink_folder("tensorboard"))]


def have_begun(run):
    """Whether records that are not there now have rows, on the disk; what a killed one still makes may come, too."""
    until, before = time.monotonic() + ENDED_S, files_of(run)

    def begun():
        assert time.monotonic() < until
        records, events = (now - known for now, known in zip(files_of(run), before, strict=True))
        return any(rows_of(run, one) for one in records) and any(event_rows(run, one) for one in events)

    return begun


def test_ten_kills_lose_nothing_and_send_nothing_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, seed = make_run(tmp_path), random.Random(0)  # noqa: S311
    keep_batch(run)
    step = 0
    for attempt in range(KILLS):
        begun = have_begun(run)
        processes = [tracker(run, sink) for sink in ("wandb", "tensorboard")]
        waits = attempt % 2 == 0  # every other one is killed while it starts
        ends = time.monotonic() + seed.uniform(0.2, 4.0)
        while time.monotonic() < ends or (waits and not begun()):
            step += 1
            train(run, step, attempt=attempt + 1)
            load(run, 0, time.time(), cpu=0.5)
            time.sleep(0.05)
        with run.metrics.open("a") as file:  # training dies in the middle of a line
            file.write('{"split": "train", "st')
        for process in processes:
            process.kill()
            process.communicate(timeout=ENDED_S)
        step = max(0, step - 5)  # training goes on from a checkpoint before
    run.append_metrics(**VAL | {"step": step} | show(run, tmp_path / "photo.jpg", "a", "b"))
    finish(run)
    for sink in ("wandb", "tensorboard"):
        process = tracker(run, sink)
        said, errors = process.communicate(timeout=ENDED_S)
        assert (process.returncode, said, errors) == (0, "", "")
    reached = max(row["step"] for row in rows_of(run) if "train/loss" in row)
    everything = list(range(1, reached + 1))
    assert [row["step"] for row in rows_of(run) if "train/loss" in row] == everything
    assert [row["step"] for row in rows_of(run) if "val/loss" in row] == [step]
    assert [found for found, tag, _ in event_rows(run) if tag == "train/loss"] == everything
    assert [found for found, tag, _ in event_rows(run) if tag == "val/loss"] == [step]
    shown = EventAccumulator(str(run.sink_folder("tensorboard"))).Reload()
    for key, at in (("train/batch", 1), ("val/examples", step)):
        assert [row["step"] for row in read_record(run)["history"] if f"{key}/filenames" in row] == [at]
        assert [image.step for image in shown.Images(key)] == [at]
    loads = [row["step"] for row in rows_of(run) if "node-0/cpu" in row]
    assert loads
    assert loads == [found for found, tag, _ in event_rows(run) if tag == "node-0/cpu"]  # each with the same record
