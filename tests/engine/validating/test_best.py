"""What is kept of the best checkpoint's validation, over ranks and beside what was counted."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer


@pytest.fixture
def found(make_run, engine, in_ranks):
    """What rank 0 wrote, and its last validation, of a training on so many ranks."""

    def call(world_size):
        run = make_run(f"run-{world_size}", train={"early_stopping": {"metric": "val/top1", "mode": "max"}})

        def train(ranks):
            torch.set_num_threads(1)
            records = engine.records(run) if ranks.rank == 0 else None
            Trainer(build_parts(run, ranks, engine.cpu), recorder=records, stop_requested=engine.never).run()
            return (records.found, records.lines[-1]) if records else None

        return in_ranks(world_size, train)[0]

    return call


@pytest.mark.parametrize("world_size", [1, 2])
def test_classes_calibration_and_images_agree_with_what_was_counted(found, world_size):
    kept, line = found(world_size)
    assert kept["samples"] == line["samples"] == sum(row["val"] for row in kept["classes"].values())
    assert sum(row["train"] for row in kept["classes"].values()) == 37
    assert {name: row["val"] for name, row in kept["classes"].items()} == {
        name: row["samples"] for name, row in line["per_class"].items()
    }
    hits = sum(row["hits"] for row in kept["classes"].values())
    assert hits / line["samples"] == pytest.approx(line["top1"])
    images, sure, right = (sum(column) for column in zip(*kept["calibration"], strict=True))
    assert (images, right) == (line["samples"], hits)
    gap = sum(abs(s - r) for _, s, r in kept["calibration"]) / images
    assert gap == pytest.approx(line["ece"], abs=1e-5)
    assert sure > 0
    assert len(kept["right"]) == min(12, hits)
    curves = kept["precision_recall"]
    assert set(curves["classes"]) == {name for name, row in kept["classes"].items() if row["val"]}
    for row in (curves["mean"], *curves["classes"].values()):
        assert len(row) == 33
        assert row == sorted(row, reverse=True)
    for row in [*kept["wrong"], *kept["right"]]:
        assert Path(row["image"]).parent.name == row["true"]
        assert (row["predicted"] == row["true"]) == (row in kept["right"])
    for rows in (kept["wrong"], kept["right"]):
        assert [row["confidence"] for row in rows] == sorted((row["confidence"] for row in rows), reverse=True)
    assert sum(row["count"] for row in kept["confusions"]) == line["samples"] - hits
    assert set(kept["intervals"]) == {"auroc", "average_precision"}
    for name, (low, high) in kept["intervals"].items():
        assert low < line[name] < high
    roc = kept["roc"]["mean"]
    assert roc[-1] == 1.0  # of all images
    assert sum(map(sum, itertools.pairwise(roc))) / 2 / (len(roc) - 1) == pytest.approx(line["auroc"], abs=0.05)
