"""What a run's own records and its last checkpoint say: steps lost, every sample once, the same bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launcher.runs.history import events
from launcher.system.files import read_jsonl
from tests.faults.bench import NUM_TRAIN, NUM_VAL

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run's records come to when later attempts replace what they do again."""

    train: list[dict]
    """A line for each step that counts."""
    val: list[dict]
    """A line for each epoch that counts."""
    lost: list[int]
    """For each time that training went on: the steps that it did again."""


def read(run: RunDir) -> Record:
    """Merge metrics.jsonl with the starts and resumptions in events.jsonl, in the order of time."""
    entries = [(line["time"], line["split"], line) for line in read_jsonl(run.metrics)]
    entries += [(e["time"], e["kind"], e) for e in events(run, "attempt_started") + events(run, "resumed")]
    kept: list[dict] = []
    lost: list[int] = []
    attempt, fresh = 0, False
    for _, kind, entry in sorted(entries, key=lambda item: item[0]):
        if kind == "attempt_started":
            attempt, fresh = entry["attempt"], attempt > 0
        elif kind == "resumed" or (fresh and entry["attempt"] == attempt):
            at = entry["step"] if kind == "resumed" else 0
            lost.append(max((line["step"] for line in kept), default=0) - at)
            kept = [line for line in kept if line["step"] <= at]
            fresh = False
        if kind in ("train", "val"):
            late = entry["attempt"] < attempt and not fresh
            assert not late, f"attempt {entry['attempt']} still trained while {attempt} did: {entry}"
            kept.append(entry)
    train = [line for line in kept if line["split"] == "train"]
    # The checkpoint may be of the epoch's last step, before its validation, which then is done again.
    val = {line["step"]: line for line in kept if line["split"] == "val"}
    return Record(train=train, val=list(val.values()), lost=lost)


def every_sample_once(run: RunDir, *, epochs: int, left_out: int = 0) -> Record:
    """Assert that the lines of steps tile each epoch, and that there is one validation of each."""
    record = read(run)
    assert [line["step"] for line in record.train] == list(range(1, len(record.train) + 1)), "steps are missing"
    for epoch in range(epochs):
        lines = [line for line in record.train if line["epoch"] == epoch]
        ends = [line["offset"] for line in lines]
        assert ends == sorted(ends), f"epoch {epoch} does not go on: {ends}"
        assert ends[-1] == NUM_TRAIN, f"epoch {epoch} ends at {ends[-1:]} of {NUM_TRAIN}"
        widths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        samples = [line["samples"] for line in lines]
        if not left_out:
            assert samples == widths, f"epoch {epoch}: samples {samples} for positions {widths}"
        assert sum(samples) == NUM_TRAIN - left_out, f"epoch {epoch} used {sum(samples)} samples"
    assert [(line["epoch"], line["samples"]) for line in record.val] == [(e, NUM_VAL) for e in range(epochs)]
    return record


def same_bits(run: RunDir, expected: RunDir) -> None:
    """Assert that weights, EMA, optimizer and the rest of the state are those of another run, also of the best one."""
    for ours, theirs in (
        (run.last_checkpoint, expected.last_checkpoint),
        (run.best_checkpoint, expected.best_checkpoint),
    ):
        assert ours.resolve().name == theirs.resolve().name, f"{ours.resolve()} is not of {theirs.resolve()}'s step"
        folders = (ours, theirs)
        weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
        assert weights[0] == weights[1], f"the weights of {ours.resolve()} are others"
        averages = [file.read_bytes() if (file := folder / "ema.safetensors").exists() else b"" for folder in folders]
        assert averages[0] == averages[1], f"the moving average of {ours.resolve()} is another"
        optimizers = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in folders]
        assert identical(*optimizers), f"the optimizer's state of {ours.resolve()} is another"
        states = [json.loads((folder / "state.json").read_text()) for folder in folders]
        for state in states:
            del state["run_id"], state["recipe"]  # a fault may need settings of its own
        assert states[0] == states[1], f"state.json of {ours.resolve()} is another"


def identical(one, other) -> bool:
    """Whether nested states are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(identical, one, other))
    return one == other


def nothing_written_is_lost(run: RunDir) -> None:
    """Assert that each resumption was from a checkpoint no older than the newest that was reported as written."""
    reported = events(run, "checkpoint")
    for resumed in events(run, "resumed"):
        newest = max((e["step"] for e in reported if e["time"] < resumed["time"]), default=0)
        assert resumed["step"] >= newest, f"went on from step {resumed['step']}, though {newest} was written"


def went_on(run: RunDir, expected: RunDir, *, epochs: int) -> int:
    """Assert that a run came to the same end as the undisturbed one, each sample used once; return the steps lost."""
    assert run.read_status()["state"] == "completed", run.read_status()
    same_bits(run, expected)
    nothing_written_is_lost(run)
    return sum(every_sample_once(run, epochs=epochs).lost)
