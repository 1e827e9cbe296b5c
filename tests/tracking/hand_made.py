"""Run directories made by hand, trackers as processes, and what they wrote, read back."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.json_format import MessageToDict
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from launcher.recipe import load as recipes
from launcher.runs import thumbnails
from launcher.runs.run_dir import RunDir
from launcher.system.files import append_jsonl, write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
RUN_ID = "digits-20260101-120000-ab12"
KEY = "0123456789" * 4
TRAIN = {"split": "train", "attempt": 1, "epoch": 0, "step": 10, "samples": 80, "loss": 2.5, "top1": 0.25}
TRAIN |= {"top5": 0.5, "lr": 0.01, "lr/head": 0.1, "images_per_s": 40.0, "data_wait": 0.25, "grad_norm": 1.5}
PER_CLASS = {name: {"recall": 0.5, "precision": 0.25, "f1": 0.4, "samples": 5} for name in "abcdef"}
VAL = {"split": "val", "attempt": 1, "epoch": 0, "step": 20, "samples": 30, "loss": 2.0, "top1": 0.5}
VAL |= {"top5": 0.75, "f1": 0.4, "per_class": PER_CLASS, "confusion": [[5, 0, 0, 0, 0, 0]] * 6}
TABLES = ("val/classes", "val/confusion", "val/roc", "val/pr", "val/mistakes", "val/examples", "train/batch")
ENDED_S = 300
"""Far more than anything here takes; trackers give way to all else on a machine that is busy (nice)."""


def make_run(path: Path, mode: str = "offline", **tracking: object) -> RunDir:
    values = {"name": "digits", "data": {"name": "digits"}, "model": {"unfreeze": {"3": "layer1"}}}
    recipe = recipes.from_dict({**values, "tracking": {"wandb": {"mode": mode}, **tracking}})
    run = RunDir(path / RUN_ID)
    run.create()
    run.recipe.write_text(recipes.to_yaml(recipe))
    write_json_atomic(run.plan, {"run_id": RUN_ID, "procs_per_node": 2, "created": 1.0})
    return run


def train(run: RunDir, *steps: int, **changes: object) -> None:
    """Lines of training."""
    for step in steps:
        run.append_metrics(**TRAIN | {"step": step} | changes)


def keep_validation(run: RunDir, photo: Path) -> None:
    """validation.json of the line that VAL is, with a mistake whose image is there and one whose image is not."""
    Image.new("RGB", (300, 200), "red").save(photo)
    rows = [{"image": str(place), "true": "a", "predicted": "b", "confidence": 0.75} for place in (photo, "gone.png")]
    roc = {"mean": [0.25, 0.75, 1.0], "classes": {"a": [0.5, 1.0, 1.0]}}
    precision = {"mean": [1.0, 0.8], "classes": {"b": [1.0, 1.0, 0.5]}}
    counts = {"samples": 10, "classes": {"b": {"val": 4}}}
    curves = {"roc": roc, "precision_recall": precision}
    write_json_atomic(run.validation, {"step": VAL["step"], "wrong": rows, **counts, **curves})


def show(run: RunDir, photo: Path, *answers: str) -> dict:
    """What a line of a validation has to show: an image that is there and one that is not, with these answers."""
    if not photo.exists():
        Image.new("RGB", (300, 200), "red").save(photo)
    images = zip((str(photo), "gone.png"), answers, strict=True)
    return {"examples": [{"image": i, "true": "a", "predicted": said, "confidence": 0.75} for i, said in images]}


def keep_batch(run: RunDir) -> None:
    """sample_batch.json, as the first step leaves it."""
    picture = thumbnails.data_uri(Image.new("RGB", (32, 32), "blue"))
    rows = [{"image": "0.png", "class": "a", "picture": picture}, {"image": "1.png", "class": "b", "picture": picture}]
    write_json_atomic(run.sample_batch, {"version": 1, "epoch": 0, "mixed": "mixup", "images": rows})


def load(run: RunDir, node: int, time: float, **values: object) -> None:
    """A line of what a node does."""
    run.node_load(node).parent.mkdir(exist_ok=True)
    append_jsonl(run.node_load(node), {"time": time, "host": f"n{node}", **values})


def finish(run: RunDir, state: str = "completed", **fields: object) -> None:
    """The end of a run, as its supervisor leaves it."""
    run.update_status(state=state, **fields)


def tracker(run: RunDir, sink: str = "wandb", *options: str, **environment: str) -> subprocess.Popen[str]:
    """The process that tracks; it goes on until its standard input ends."""
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.tracking", str(run.path), sink, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + ENDED_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def track(run: RunDir, sink: str = "wandb", *options: str, **environment: str) -> list[str]:
    """Track what there is; what it said to people."""
    process = tracker(run, sink, *options, **environment)
    said, errors = process.communicate(timeout=ENDED_S)
    assert errors == ""
    return said.splitlines()


def read_log(file: Path) -> Iterator[bytes]:
    """The whole records of wandb's transaction log: LevelDB's log format, 7 bytes of wandb's own before it."""
    data, at, record = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"[: len(data)]  # it may be written just now
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no room for a header at the end of a block
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + size > len(data):
            return
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_record(run: RunDir, folders: str = "offline-run-*") -> dict:
    """What all of wandb's offline records of the run hold, oldest first, by kind."""
    lists = ("run", "history", "metric", "artifact", "exit", "alert")
    found: dict = {"summary": {}, "config": {}, **{kind: [] for kind in lists}}
    for file in sorted(run.wandb.glob(f"{folders}/run-*.wandb")):
        for data in read_log(file):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            value = MessageToDict(getattr(record, kind), preserving_proto_field_name=True)
            if kind == "history":
                found["history"].append({"/".join(i["nested_key"]): json.loads(i["value_json"]) for i in value["item"]})
            elif kind == "summary":
                for item in value["update"]:
                    found["summary"][item.get("key") or "/".join(item["nested_key"])] = json.loads(item["value_json"])
            elif kind == "config":
                for item in value.get("update", []):
                    found["config"][item.get("key") or "/".join(item["nested_key"])] = json.loads(item["value_json"])
            elif kind in found:
                found[kind].append(value)
    return found


def rows_of(run: RunDir, folders: str = "offline-run-*") -> list[dict]:
    """wandb's rows, without what it adds itself and without tables."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("_", *TABLES))}
        for row in read_record(run, folders)["history"]
    ]


def steps_of(run: RunDir, folders: str = "offline-run-*") -> list[int]:
    return [row["step"] for row in rows_of(run, folders)]


def event_rows(run: RunDir, files: str = "events.out.tfevents.*") -> list[tuple[int, str, float]]:
    """What TensorBoard's own reader finds: step, tag and value of each number."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = []
    for file in sorted(run.sink_folder("tensorboard").glob(files)):
        for event in EventFileLoader(str(file)).Load():
            numbers = [value for value in event.summary.value if value.HasField("tensor") and value.tensor.float_val]
            found += [(event.step, value.tag, round(value.tensor.float_val[0], 6)) for value in numbers]
    return found
