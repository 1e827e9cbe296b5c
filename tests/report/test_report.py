from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import markupsafe
import numpy as np
import pytest
import yaml

from launcher.errors import UsageError
from launcher.node import finish
from launcher.recipe import load as recipes
from launcher.recipe.metrics import METRICS as METRIC_NAMES
from launcher.report import build as report
from launcher.report import charts as report_charts
from launcher.report import intervals, templating, test_set
from launcher.runs.run_dir import RunDir

NASTY = '<b>&"'
CLASSES = (NASTY, "cat|dog", "fox")
START = 1_795_000_000.0
RECIPE = {
    "name": "clothes",
    "model": {"arch": "mobilenet_v2", "freeze": ["backbone"]},
    "data": {"path": "/data/<clothes>", "image_size": 32},
    "optim": {"lr": 0.002, "groups": {"head": 0.01}},
    "train": {"epochs": 3, "label_smoothing": 0.1, "early_stopping": {"metric": "val/top1", "mode": "max"}},
}
PLAN = {
    "run_id": "clothes-20261124-090000-abcd",
    "name": "clothes",
    "launched_by": "launch recipes/clothes.yaml data.path='/data/<clothes>'",
    "command": ["python", "-m", "launcher.node", "runs/clothes"],
    "created": START - 2,
    "backend": "torchrun",
    "device": "cpu",
    "nodes": 1,
    "procs_per_node": 2,
    "world_size": 2,
    "host": "node1",
}
BEST = {"metric": "val/top1", "value": 0.7, "epoch": 1, "step": 8}
STATUS = {"state": "completed", "attempt": 2, "epoch": 3, "step": 12, "best": BEST, "updated": START + 100}
EVENTS = [
    {"time": START, "kind": "attempt_started", "host": "node1", "attempt": 1, "node": 0, "workers": 2},
    {"time": START + 40, "kind": "attempt_ended", "host": "node1", "attempt": 1, "node": 0, "cause": "lost_worker"}
    | {"message": "a worker <vanished>"},
    {"time": START + 50, "kind": "attempt_started", "host": "node1", "attempt": 2, "node": 0, "workers": 2},
    {"time": START + 51, "kind": "resumed", "host": "node1", "attempt": 2, "rank": 0, "step": 8},
    {"time": START + 81, "kind": "training_ended", "host": "node1", "attempt": 2, "rank": 0, "outcome": "completed"},
    {"time": START + 90_000, "kind": "export", "host": "node1", "file": "model.onnx"},
    {"time": START + 90_001, "kind": "completed", "host": "node1", "exported": True},
]
CONFUSIONS = {
    4: [[2, 1, 1], [2, 1, 0], [1, 0, 2]],
    8: [[3, 1, 0], [2, 1, 0], [0, 0, 3]],
    12: [[4, 0, 0], [3, 0, 0], [0, 0, 3]],
}
MANIFEST = {
    "run_id": PLAN["run_id"],
    "checkpoint": {"epoch": 1, "step": 8, "metric": "val/top1", "value": 0.7},
    "classes": list(CLASSES),
    "preprocessing": {"image_size": 32, "resize_size": 37, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    | {"interpolation": "bilinear", "antialias": True},
    "val_samples": 10,
    "reference": {"format": "pytorch", "top1": 0.7, "size_mb": 9.2, "latency_p50_ms": 14.2, "latency_p95_ms": 16.8},
    "exports": [
        {"file": "model.onnx", "format": "onnx", "top1": 0.7, "agreement": 1.0, "top1_drop": 0.0, "size_mb": 8.9}
        | {"latency_p50_ms": 4.11, "latency_p95_ms": 4.62, "accepted": True, "reason": None},
        {"file": "model.int8.onnx", "format": "int8", "top1": 0.6, "agreement": 0.9, "top1_drop": 10.0}
        | {"size_mb": 2.4, "latency_p50_ms": 3.05, "latency_p95_ms": 3.6, "accepted": False}
        | {"reason": "loses 10.00 points > 1.0 & more"},
    ],
}


def train_line(step, *, loss, attempt=1, images_per_s=100.0):
    line = {"time": stamp(step, attempt), "split": "train", "attempt": attempt, "epoch": (step - 1) // 4, "step": step}
    return line | {"samples": 64, "loss": loss, "top1": 0.5, "top5": 1.0, "lr": 0.01 / step} | rate(images_per_s)


def stamp(step, attempt):
    """Attempt 2 starts 50 s after attempt 1, at step 8."""
    return START + (3 * step if attempt == 1 else 50 + 3 * (step - 8))


def rate(images_per_s):
    return {"images_per_s": images_per_s}


def val_line(step, *, attempt=1, loss=0.8, classes=CLASSES, confusion=None):
    counts = np.array(confusion or CONFUSIONS[step])
    rows = {
        name: {"recall": counts[i, i] / counts[i].sum(), "precision": 0.5, "f1": 0.5, "samples": int(counts[i].sum())}
        for i, name in enumerate(classes)
    }
    line = {"time": stamp(step, attempt) + 1, "split": "val", "attempt": attempt, "epoch": step // 4 - 1, "step": step}
    line |= {"samples": int(counts.sum()), "loss": loss, "top1": counts.trace() / counts.sum(), "top5": 1.0, "f1": 0.6}
    return line | {"per_class": rows, "confusion": counts.tolist()}


METRICS = [
    train_line(2, loss=2.0, images_per_s=50.0),
    train_line(4, loss=1.5),
    val_line(4, loss=1.1),
    train_line(6, loss=1.2),
    train_line(8, loss=1.0),
    val_line(8, loss=0.9),
    train_line(10, loss=99.0),
    # attempt 1 died here; attempt 2 goes on from step 8
    train_line(10, loss=0.75, attempt=2, images_per_s=110.0),
    train_line(12, loss=0.5, attempt=2, images_per_s=120.0),
    val_line(12, attempt=2, loss=0.95),
]


@pytest.fixture
def write_run(tmp_path):
    """Write a run directory; what is given replaces a file's content, and None leaves the file out."""

    def write(*, recipe=RECIPE, plan=PLAN, status=STATUS, events=EVENTS, metrics=METRICS, manifest=MANIFEST):
        run = RunDir(tmp_path / "run of <clothes>")
        run.create()
        run.exports.mkdir()
        run.recipe.write_text(recipes.to_yaml(recipes.from_dict(recipe)))
        for path, value in ((run.plan, plan), (run.status, status), (run.export_manifest, manifest)):
            if value is not None:
                path.write_text(json.dumps(value))
        for path, lines in ((run.events, events), (run.metrics, metrics)):
            if lines is not None:
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return write


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def written(run):
    """Write the report; return report.json as strict JSON, and the page."""
    report.write_report(run)
    data = json.loads(run.report_json.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    return data, run.report_html.read_text(encoding="utf-8")


class Page(HTMLParser):
    """The page's tags and texts; fails where a tag is not closed in its turn."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def named(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]

    def text_of(self, name):
        return [text for tag, text in self.texts if tag == name]


def cells_of(page, caption):
    """The rows of the table with this caption, as lists of texts without markup."""
    table = next(part for part in page.split("<table")[1:] if f"<caption>{caption}" in part).split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    return [[html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in row] for row in rows]


# The data


def test_the_report_says_what_the_run_directory_says(write_run):
    run = write_run()
    data, _ = written(run)
    assert {key: data[key] for key in ("run_id", "name", "state", "command", "created", "host", "path")} == {
        "run_id": "clothes-20261124-090000-abcd",
        "name": "clothes",
        "state": "completed",
        "command": "launch recipes/clothes.yaml data.path='/data/<clothes>'",
        "created": START - 2,
        "host": "node1",
        "path": str(run.path),
    }
    assert (data["backend"], data["device"], data["nodes"], data["world_size"]) == ("torchrun", "cpu", 1, 2)
    assert data["best"] == BEST
    assert data["recipe"]["optim"]["lr"] == 0.002
    assert data["recipe"] == json.loads(json.dumps(recipes.to_dict(recipes.read_resolved(run.recipe))))
    assert data["exports"] == {**MANIFEST, "of_best": True}
    assert (data["missing"], data["next"]) == ([], [])


def test_build_report_is_what_report_json_holds(write_run):
    run = write_run(recipe=RECIPE | {"model": {"unfreeze": {3: "layer1"}}})
    assert written(run)[0] == report.build_report(run)


def test_the_supervisor_command_stands_where_nothing_says_what_was_typed(write_run):
    run = write_run(plan={key: value for key, value in PLAN.items() if key != "launched_by"})
    assert report.build_report(run)["command"] == "python -m launcher.node runs/clothes"


def test_classes_and_confusion_are_those_of_the_best_epoch_not_of_the_last(write_run):
    data, _ = written(write_run())
    assert data["classes"] == list(CLASSES)
    assert data["confusion"] == CONFUSIONS[8]
    assert [row["recall"] for row in data["per_class"].values()] == [3 / 4, 1 / 3, 1.0]
    assert (data["best_val"]["step"], data["best_val"]["top1"]) == (8, 0.7)
    assert (data["final_val"]["step"], data["final_val"]["loss"]) == (12, 0.95)
    assert data["mistakes"] == [
        {"true": "cat|dog", "predicted": NASTY, "count": 2},
        {"true": NASTY, "predicted": "cat|dog", "count": 1},
    ]


def test_a_step_that_came_again_after_a_resume_counts_once_and_the_last_line_wins(write_run):
    data, _ = written(write_run(metrics=[METRICS[5], *METRICS[:5], *METRICS[6:]]))
    assert [(point["step"], point["loss"]) for point in data["curves"]["train"]] == [
        (2, 2.0),
        (4, 1.5),
        (6, 1.2),
        (8, 1.0),
        (10, 0.75),
        (12, 0.5),
    ]
    assert [point["step"] for point in data["curves"]["val"]] == [4, 8, 12]
    assert data["images_per_s"] == 100.0  # the median of 50, 100, 100, 100, 110, 120
    assert set(data["curves"]["val"][0]) == {"epoch", "step", "samples", *METRIC_NAMES}


def test_attempts_have_their_cause_and_what_they_did(write_run):
    first, second = written(write_run())[0]["attempts"]
    assert first == {
        "attempt": 1,
        "started": START,
        "duration_s": 40.0,
        "hosts": ["node1"],
        "resumed_step": None,
        "last_step": 10,
        "cause": "lost_worker",
        "message": "a worker <vanished>",
    }
    assert (second["resumed_step"], second["last_step"], second["cause"]) == (8, 12, "completed")


def test_time_is_that_of_training_and_not_of_an_export_the_next_day(write_run):
    data, _ = written(write_run())
    assert data["wall_s"] == 81.0
    assert data["training_s"] == 40.0 + 31.0


def test_kept_features_of_a_frozen_backbone_are_said_once(write_run):
    kept = {"time": START + 1, "kind": "features_kept", "host": "node1", "attempt": 1, "rank": 0, "view": 0, "views": 1}
    kept |= {"split": "train", "images": 1000, "size_mb": 5.12, "place": "memory", "seconds": 4.1}
    data, page = written(write_run(events=[*EVENTS, kept, kept | {"seconds": 5.2}]))
    assert [(row["split"], row["images"], row["seconds"]) for row in data["features"]] == [("train", 1000, 5.2)]
    assert "features of 1,000 images kept, 5 MB in memory, 1 view" in page


def test_an_attempt_ends_for_the_reason_of_the_node_that_saw_it(write_run):
    ends = [
        {"time": START + 20, "kind": "attempt_ended", "host": "node2", "attempt": 1, "node": 1, "cause": "lost_worker"},
        {"time": START + 21, "kind": "attempt_ended", "host": "node1", "attempt": 1, "node": 0, "cause": "bug"},
    ]
    failure = {"time": START + 19, "kind": "failure", "host": "node1", "attempt": 1, "rank": 0, "message": "x is None"}
    started = EVENTS[0] | {"host": "node2", "node": 1}
    data, _ = written(write_run(events=[EVENTS[0], started, failure, *ends], metrics=METRICS[:1]))
    (attempt,) = data["attempts"]
    assert (attempt["cause"], attempt["message"]) == ("bug", "x is None")
    assert attempt["hosts"] == ["node1", "node2"]


@pytest.mark.parametrize(("state", "last"), [("running", "running"), ("failed", "failed")])
def test_an_attempt_without_an_end_has_the_state_of_the_run_if_it_is_the_last(write_run, state, last):
    events = [event for event in EVENTS if event["kind"] in ("attempt_started", "resumed")]
    data, _ = written(write_run(status=STATUS | {"state": state}, events=events))
    assert [attempt["cause"] for attempt in data["attempts"]] == ["unknown", last]


def test_a_failed_run_has_a_report_that_says_why_and_what_to_do(write_run):
    end = {"time": START + 9, "kind": "attempt_ended", "host": "node1", "attempt": 1, "cause": "out_of_memory"}
    run = write_run(
        status={"state": "failed", "attempt": 1, "epoch": 0, "step": 2, "best": None, "updated": START},
        events=[EVENTS[0], end | {"message": "CUDA out of memory"}],
        metrics=METRICS[:1],
        manifest=None,
    )
    data, page = written(run)
    assert (data["state"], data["best"], data["best_val"], data["final_val"]) == ("failed", None, None, None)
    assert (data["per_class"], data["confusion"], data["exports"]) == (None, None, None)
    assert data["attempts"][0]["cause"] == "out_of_memory"
    assert [row["command"].split(" ")[:2] for row in data["next"]] == [["launch", "why"], ["launch", "resume"]]
    assert cells_of(page, "Each start")[1][-1] == "out of memory: CUDA out of memory"
    assert '<span class="bad">failed</span>' in page
    assert "state: failed" in run.model_card.read_text()


@pytest.mark.parametrize(
    ("state", "exported_step", "verbs"),
    [
        ("completed", 8, []),
        ("early_stopped", None, ["export"]),
        ("completed", 4, ["export"]),
        ("preempted", 8, ["resume"]),
        ("cancelled", None, ["resume", "export"]),
        ("failed", None, ["why", "resume", "export"]),
        ("running", None, ["report"]),
    ],
)
def test_next_are_the_commands_worth_running(write_run, state, exported_step, verbs):
    manifest = exported_step and MANIFEST | {"checkpoint": MANIFEST["checkpoint"] | {"step": exported_step}}
    run = write_run(status=STATUS | {"state": state}, manifest=manifest)
    rows = report.build_report(run)["next"]
    assert [row["command"] for row in rows] == [f"launch {verb} '{run.path}'" for verb in verbs]
    assert all(row["why"] for row in rows)


@pytest.mark.parametrize(("state", "shown"), [("completed", True), ("failed", True), ("running", False)])
def test_records_that_wandbs_server_lacks_come_with_the_command_that_sends_them(write_run, state, shown):
    event = {"time": START + 95_000, "kind": "wandb_unsynced", "folder": "run-2-a", "reason": "given up"}
    run = write_run(status=STATUS | {"state": state}, events=[*EVENTS, event])
    for name in ("offline-run-1-a", "run-2-a", "run-3-a"):
        (run.wandb / name).mkdir(parents=True)
        (run.wandb / name / "run-a.wandb").touch()
    command = f"wandb sync --include-online '{run.wandb}/offline-run-1-a' '{run.wandb}/run-2-a'"
    data, page = written(run)
    assert (command in [row["command"] for row in data["next"]]) == shown
    assert (command in html.unescape(page)) == shown
    assert data["wall_s"] < 100  # the exports of another day may have written the event


def test_exports_of_another_checkpoint_than_the_best_are_said_to_be(write_run):
    run = write_run(manifest=MANIFEST | {"checkpoint": MANIFEST["checkpoint"] | {"step": 4}})
    data, page = written(run)
    assert data["exports"]["of_best"] is False
    assert "another checkpoint than the best" in page
    assert "another checkpoint than the best" in run.model_card.read_text()


def test_settings_are_the_whole_recipe_with_the_defaults_beside(write_run):
    data, page = written(write_run())
    rows = {row["key"]: row for row in data["settings"]}
    assert rows["optim.lr"] == {"key": "optim.lr", "value": 0.002, "default": 0.01}
    assert rows["optim.groups"] == {"key": "optim.groups", "value": {"head": 0.01}, "default": {}}
    assert rows["train.early_stopping.patience"]["value"] == 5
    changed = cells_of(page, "What differs")[1:]
    assert changed == [
        ["name", "clothes", "run"],
        ["model.arch", "mobilenet_v2", "resnet50"],
        ["model.freeze", '["backbone"]', "[]"],
        ["data.path", "/data/<clothes>", "null"],
        ["data.image_size", "32", "auto"],
        ["optim.lr", "0.002", "0.01"],
        ["optim.groups", '{"head": 0.01}', "{}"],
        ["train.epochs", "3", "20"],
        ["train.label_smoothing", "0.1", "0.0"],
        ["train.early_stopping.metric", "val/top1", "val/loss"],
        ["train.early_stopping.mode", "max", "min"],
    ]
    assert len(cells_of(page, "The resolved recipe")) == len(rows) + 1


# Files that are not there, or not whole

FILES = {
    "status": "status.json",
    "events": "events.jsonl",
    "metrics": "metrics.jsonl",
    "manifest": "manifest.json",
}


@pytest.mark.parametrize("absent", FILES)
def test_a_missing_file_is_named_and_the_rest_is_reported(write_run, absent):
    run = write_run(**{absent: None})
    data, page = written(run)
    told = [line for line in data["missing"] if "not there" in line]
    assert len(told) == 1
    assert told[0].startswith(FILES[absent])
    assert told[0] in html.unescape(page)
    Page(page)
    assert run.model_card.is_file()
    assert (data["state"] == "unknown") == (absent == "status")
    assert [row["hosts"] for row in data["attempts"]] == ([[], []] if absent == "events" else [["node1"], ["node1"]])
    assert (data["curves"]["val"] == []) == (absent == "metrics")
    assert (data["exports"] is None) == (absent == "manifest")


def test_a_run_that_has_only_been_planned_has_a_report(write_run):
    data, page = written(write_run(status=None, events=None, metrics=None, manifest=None))
    assert [line.split(" ")[0] for line in data["missing"]] == list(FILES.values())
    assert (data["attempts"], data["wall_s"], data["training_s"], data["images_per_s"]) == ([], None, None, None)
    assert "no validation yet" in page
    assert Page(page).named("svg") == []


@pytest.mark.parametrize("cut", FILES)
def test_a_file_cut_short_is_named_and_what_is_whole_of_it_is_used(write_run, cut):
    run = write_run()
    path = {"status": run.status, "events": run.events, "metrics": run.metrics, "manifest": run.export_manifest}[cut]
    path.write_bytes(path.read_bytes()[:-25])
    data, page = written(run)
    (told,) = data["missing"]
    assert "cut short" in told
    assert told.startswith(FILES[cut])
    Page(page)
    whole = [point["step"] for point in data["curves"]["val"]]
    assert whole == ([4, 8] if cut == "metrics" else [4, 8, 12])
    assert data["final_val"]["step"] == whole[-1]
    assert len(data["attempts"]) == 2


def test_a_best_checkpoint_whose_validation_is_lost_is_named(write_run):
    data, page = written(write_run(metrics=[line for line in METRICS if (line["split"], line["step"]) != ("val", 8)]))
    assert data["missing"] == ["metrics.jsonl has no validation of step 8, that of the best checkpoint"]
    assert (data["per_class"], data["confusion"], data["best_val"]) == (None, None, None)
    assert data["classes"] == list(CLASSES)  # from the exports
    assert "Confusion matrix" not in page


@pytest.mark.parametrize(("name", "content"), [("plan.json", '{"run_id"'), ("recipe.yaml", "optim: {lrr: 1}")])
def test_without_plan_or_recipe_the_error_names_the_file(write_run, name, content):
    run = write_run()
    (run.path / name).write_text(content)
    with pytest.raises(UsageError, match=name):
        report.write_report(run)
    assert not run.report_json.exists()


def test_what_is_not_a_number_becomes_null_and_breaks_the_curve(write_run):
    metrics = [*METRICS[:2], train_line(6, loss=math.nan, images_per_s=math.inf), *METRICS[4:5], METRICS[5]]
    data, page = written(write_run(metrics=metrics, status=STATUS | {"best": BEST | {"value": math.inf}}))
    assert [point["loss"] for point in data["curves"]["train"]] == [2.0, 1.5, None, 1.0]
    assert data["images_per_s"] == 100.0
    assert data["best"]["value"] is None
    (path,) = re.findall(r'<path class="curve train" d="([^"]*)"', page.split("<h3>Loss</h3>")[1].split("</svg>")[0])
    assert re.sub(r"[^ML]", "", path) == "MLM"
    assert not re.search(r"\b(nan|inf)\b", page, re.IGNORECASE)


def test_files_are_replaced_whole_and_nothing_is_left_beside_them(write_run):
    run = write_run()
    before = {path.name for path in run.path.iterdir()}
    for old in (run.report_json, run.report_html, run.model_card):
        old.write_text("old")
        old.chmod(0o444)  # a rename does not mind, writing into the file would
        inode = old.stat().st_ino
        report.write_report(run)
        assert old.stat().st_ino != inode
        assert old.read_text() != "old"
    assert {path.name for path in run.path.iterdir()} - before == {"report.json", "report.html", "model_card.md"}


# The page


def test_the_page_is_well_formed_and_needs_nothing_else(write_run):
    _, page = written(write_run())
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>")
    assert parsed.named("script") == [{}]  # one, in the page itself
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"link", "img", "iframe", "object", "embed", "base"})
    assert not {name for _, attrs in parsed.tags for name in attrs} & {"src", "href", "xlink:href", "srcset", "action"}
    assert not re.search(r"https?:|url\(|@import|//[a-z]", page)
    assert "prefers-color-scheme:dark" in page
    assert "width=device-width" in page
    assert "@media print" in page


def test_the_page_can_be_read_without_eyes(write_run):
    parsed = Page(written(write_run())[1])
    assert parsed.named("html") == [{"lang": "en"}]
    assert parsed.text_of("h1") == [PLAN["run_id"]]
    assert parsed.text_of("h2") == [
        "Curves",
        "Exports",
        "Classes",
        "Confusion matrix",
        "Attempts",
        "Environment",
        "Recipe",
    ]
    assert parsed.text_of("h3") == [
        *("Loss", "Top-1", "Learning rate", "Images per second"),
        *("Accuracy and time", "What happened when"),
    ]
    assert all(attrs.get("scope") in ("row", "col") for attrs in parsed.named("th"))
    labels = [attrs["aria-label"] for attrs in parsed.named("svg")]
    assert labels[0] == (
        "Loss over 12 optimizer steps: train from 2 to 0.5, lowest 0.5, highest 2; "
        "val from 1.1 to 0.95, lowest 0.9, highest 1.1"
    )
    assert all(attrs["role"] == "img" for attrs in parsed.named("svg"))
    scrolling = [attrs for attrs in parsed.named("div") if attrs.get("class") == "scroll"]
    assert len(scrolling) == len(parsed.named("table"))
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolling)


def test_every_text_is_escaped(write_run):
    _, page = written(write_run())
    parsed = Page(page)
    assert "b" not in {tag for tag, _ in parsed.tags}
    assert "<clothes>" not in page
    assert "<vanished>" not in page
    assert cells_of(page, "Each class")[1][0] == NASTY
    assert cells_of(page, "Rows:")[0] == ["", *CLASSES]
    assert cells_of(page, "Exported models")[3][-1] == "loses 10.00 points > 1.0 & more"
    assert "&#34;" in page
    assert str(markupsafe.escape(PLAN["launched_by"])) in page


def test_the_headline_says_best_state_time_and_speed(write_run):
    parsed = Page(written(write_run())[1])
    names, values = parsed.text_of("dt"), [text for text in parsed.text_of("dd") if text]
    assert names == ["best val/top1", "state", "duration", "images/s", "exports accepted"]
    assert values == ["70.00%", "1 min 21 s", "100", "1 of 2"]
    assert "after epoch 2, step 8" in parsed.text_of("small")


def test_a_loss_is_no_percentage(write_run):
    _, page = written(write_run(status=STATUS | {"best": BEST | {"metric": "val/loss", "value": 0.9}}))
    assert "<dt>best val/loss</dt><dd>0.9000<" in page


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.04, "0.0 s"), (59.9, "59.9 s"), (61.0, "1 min 01 s"), (7384.0, "2 h 03 min")]
)
def test_durations_are_readable(seconds, text):
    assert templating.duration(seconds) == text


def test_the_table_of_exports_has_the_reference_first_and_says_why_not(write_run):
    rows = cells_of(written(write_run())[1], "Exported models")
    why = "loses 10.00 points > 1.0 & more"
    assert rows == [
        ["file", "verdict", "format", "top-1", "points lost", "agreement", "MB", "p50 ms", "p95 ms", "why not"],
        ["the checkpoint", "reference", "pytorch", "70.00%", "-", "-", "9.20", "14.20", "16.80", ""],
        ["model.onnx", "accepted", "onnx", "70.00%", "+0.00", "100.00%", "8.90", "4.11", "4.62", ""],
        ["model.int8.onnx", "not accepted", "int8", "60.00%", "+10.00", "90.00%", "2.40", "3.05", "3.60", why],
    ]


def test_where_all_exports_are_accepted_no_column_says_why_not(write_run):
    run = write_run(manifest=MANIFEST | {"exports": MANIFEST["exports"][:1]})
    rows = cells_of(written(run)[1], "Exported models")
    assert [row[-1] for row in rows] == ["p95 ms", "16.80", "4.62"]


def test_the_attempts_say_from_where_to_where_and_why_they_ended(write_run):
    rows = cells_of(written(write_run())[1], "Each start")
    why = "lost worker: a worker <vanished>"
    assert rows[1] == ["1", "2026-11-18 11:06:40 UTC", "40.0 s", "the beginning", "10", "node1", why]
    assert rows[2][3:5] == ["step 8", "12"]


def test_the_heat_map_shades_by_the_share_of_the_true_class(write_run):
    _, page = written(write_run())
    table = page.split('<table class="heat">')[1]
    shades = [float(value) for value in re.findall(r"var\(--heat\)/([\d.]+)", table)]
    assert shades == [0.41, 0.14, 0.0, 0.37, 0.18, 0.0, 0.0, 0.0, 0.55]
    assert [row[1:] for row in cells_of(page, "Rows:")[1:]] == [[str(n) for n in row] for row in CONFUSIONS[8]]


def test_more_than_30_classes_have_mistakes_but_no_heat_map(write_run):
    classes = [f"class {number}" for number in range(31)]
    confusion = (np.eye(31, dtype=int) * 5).tolist()
    confusion[3][7] = 2
    data, page = written(write_run(metrics=[val_line(8, classes=classes, confusion=confusion)]))
    assert '<table class="heat">' not in page
    assert "<li><q>class 3</q> taken for <q>class 7</q>: 2</li>" in page
    assert data["confusion"] == confusion


def test_more_than_100_classes_have_neither(write_run):
    line = {key: value for key, value in val_line(8).items() if key not in ("per_class", "confusion")}
    data, page = written(write_run(metrics=[line]))
    assert (data["per_class"], data["best_val"]["top1"]) == (None, 0.7)
    assert Page(page).text_of("h2") == ["Curves", "Exports", "Attempts", "Environment", "Recipe"]


def test_but_their_most_frequent_mistakes_where_they_were_recorded(write_run):
    line = {key: value for key, value in val_line(8).items() if key not in ("per_class", "confusion")}
    mistakes = [{"true": "tern", "predicted": "gull", "count": 7}, {"true": "a<b", "predicted": "tern", "count": 2}]
    data, page = written(write_run(metrics=[line | {"mistakes": mistakes}]))
    assert data["mistakes"] == mistakes
    assert "<li><q>tern</q> taken for <q>gull</q>: 7</li><li><q>a&lt;b</q>" in page
    assert '<table class="heat">' not in page


def test_every_point_has_a_tooltip_and_the_best_checkpoint_a_ring(write_run):
    _, page = written(write_run())
    loss = page.split("<h3>Loss</h3>")[1].split("</figure>")[0]
    assert re.findall(r"<title>(.*?)</title>", loss) == [
        "train, step 2, epoch 1: 2",
        "train, step 4, epoch 1: 1.5",
        "train, step 6, epoch 2: 1.2",
        "train, step 8, epoch 2: 1",
        "train, step 10, epoch 3: 0.75",
        "train, step 12, epoch 3: 0.5",
        "val, step 4, epoch 1: 1.1",
        "val, step 8, epoch 2: 0.9 (best checkpoint)",
        "val, step 12, epoch 3: 0.95",
    ]
    rings = re.findall(r'<circle class="val best" cx="([\d.]+)" cy="([\d.]+)"', loss)
    # Step 8 of 12; 0.9 on an axis from 0.5 to 2.
    span = report_charts.WIDTH - report_charts.LEFT - report_charts.RIGHT
    height = report_charts.HEIGHT - report_charts.TOP - report_charts.BOTTOM
    expected = (report_charts.LEFT + span * 8 / 12, report_charts.TOP + height * (2 - 0.9) / 1.5)
    assert [(float(x), float(y)) for x, y in rings] == [pytest.approx(expected, abs=0.06)]
    assert re.findall(r"<text [^>]*>(.*?)</text>", loss) == [
        *("0.5", "1", "1.5", "2"),
        *("0", "5", "10", "optimizer steps"),
        *("train", "val"),
    ]


def test_a_long_run_is_thinned_on_the_page_only_to_means_of_neighbours(write_run):
    metrics = [train_line(step, loss=2.0 if step % 2 else 4.0) for step in range(1, 1001)]
    data, page = written(write_run(metrics=metrics))
    assert len(data["curves"]["train"]) == 1000
    loss = page.split("<h3>Loss</h3>")[1].split("</figure>")[0]
    tips = re.findall(r"<title>(.*?)</title>", loss)
    assert len(tips) == 200
    assert tips[0] == "train, step 5, epoch 2: 2.8"
    assert tips[-1] == "train, step 1,000, epoch 250: 3.2"


def test_a_loss_that_explodes_is_drawn_on_a_logarithmic_axis(write_run):
    _, page = written(write_run(metrics=[*METRICS[:2], val_line(4, loss=188.0), *METRICS[3:6]]))
    chart = page.split("<h3>Loss (logarithmic)</h3>")[1].split("</figure>")[0]
    texts = re.findall(r'text-anchor="end">(.*?)</text>', chart)
    assert texts == ["0.1", "1", "10", "100", "1000", "optimizer steps"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.31, 0.93, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 0.002, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (3.0, 3.0, [1, 2, 3, 4, 5]),
        (0.0, 0.0, [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]),
        (0.0, 123456.0, [0, 50000, 100000, 150000]),
    ],
)
def test_axes_have_round_ticks_around_the_data(low, high, expected):
    assert report_charts.ticks(low, high) == pytest.approx(expected)


# The model card


def test_the_model_card_has_figures_exports_limits_and_recipe(write_run):
    run = write_run()
    report.write_report(run)
    card = run.model_card.read_text()
    assert card.startswith("---\n")
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["pipeline_tag"], head["library_name"]) == ("image-classification", "onnx")
    assert {"mobilenet_v2", "onnx"} <= set(head["tags"])
    (result,) = head["model-index"][0]["results"]
    assert {"type": "accuracy", "name": "top1", "value": 0.7} in result["metrics"]
    assert card.split("---\n")[2].lstrip().startswith("# clothes\n")
    assert "on 1 node with 2 workers each, on the CPU" in card
    assert "the energy was not measured" in card
    assert "torchvision's mobilenet\\_v2, trained from the weights DEFAULT, backbone frozen" in card
    assert r"3 classes apart: &lt;b&gt;&amp;\", cat\|dog, fox".replace('\\"', '"') in card
    assert "by val/top1 (epoch 2, step 8)" in card
    assert "| top-1 | 0.7000 |" in card
    assert "| `model.onnx` | 0.7000 | +0.00 | 100.00% | 8.9 | 4.11 | yes |" in card
    assert "| no: loses 10.00 points &gt; 1.0 &amp; more |" in card
    assert "`images`, float32 N x 3 x 32 x 32" in card
    assert "`logits`, float32 N x 3." in card
    assert "mean [0.5, 0.4, 0.3] and the standard deviation [0.2, 0.25, 0.3]" in card
    assert "the validation images, which also chose the checkpoint" in card
    assert "95 % interval 0.397 to 0.892" in card
    assert 'Fewer than 30 validation images, so figures of little worth: &lt;b&gt;&amp;"' in card
    assert run.recipe.read_text() in card


def test_no_name_breaks_a_table_of_the_model_card(write_run):
    run = write_run()
    report.write_report(run)
    rows = [line for line in run.model_card.read_text().splitlines() if line.startswith("| ") and "fox" not in line]
    columns = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in rows}
    assert columns == {3, 5, 7}
    assert r"| cat\|dog | 0.3333 |" in run.model_card.read_text()
    assert "<b>" not in run.model_card.read_text()


def test_no_text_ends_a_block_of_code_or_a_code_span_of_the_model_card(write_run):
    recipe = RECIPE | {"data": {"path": "/<x>|`y`\n```\n# b"}}
    run = write_run(recipe=recipe, plan=PLAN | {"launched_by": "launch 'a`\n\n# b'"})
    report.write_report(run)
    card = run.model_card.read_text()
    assert "Made by `launch 'a'  # b'` (run" in card
    assert r"image folder /&lt;x&gt;\|\`y\` \`\`\` \# b, `train/`." in card
    assert card.endswith(f"````yaml\n{run.recipe.read_text()}````\n")


@pytest.mark.parametrize(("num", "shown"), [(3, False), (5, False), (6, True)])
def test_top_5_of_five_classes_or_fewer_is_shown_nowhere(write_run, num, shown):
    names = tuple(f"c{index}" for index in range(num))
    confusion = (3 * np.eye(num, dtype=int)).tolist()
    run = write_run(metrics=[METRICS[0], val_line(8, classes=names, confusion=confusion)])
    data, page = written(run)
    assert data["best_val"]["top5"] == (1.0 if shown else None)
    assert ("top-5" in page) == shown
    assert ("top-5" in run.model_card.read_text()) == shown


@pytest.mark.parametrize(("bits", "told"), [(8, True), (7, False)])
def test_an_int8_model_that_is_not_for_every_cpu_is_said_to_be_one(write_run, bits, told):
    exports = [MANIFEST["exports"][0], MANIFEST["exports"][1] | {"quantization": {"weight_bits": bits}}]
    run = write_run(manifest=MANIFEST | {"exports": exports})
    report.write_report(run)
    for text in (run.report_html.read_text(), run.model_card.read_text(), finish.summary(run)):
        assert ("only for x86 CPUs with VNNI and for ARM" in text) == told


def test_without_onnx_the_model_card_shows_no_code_for_it(write_run):
    exports = [MANIFEST["exports"][0] | {"file": "model.ts", "format": "torchscript"}]
    run = write_run(manifest=MANIFEST | {"exports": exports})
    report.write_report(run)
    card = run.model_card.read_text()
    assert "model.ts" in card
    assert "import onnxruntime" not in card


REFUSED = MANIFEST["exports"][0] | {"accepted": False, "reason": "differs"}


def test_the_model_card_shows_code_for_an_onnx_file_that_is_there(write_run):
    run = write_run(manifest=MANIFEST | {"exports": [REFUSED, MANIFEST["exports"][1] | {"accepted": True}]})
    report.write_report(run)
    card = run.model_card.read_text()
    assert "`model.int8.onnx` takes `images`" in card
    assert 'InferenceSession("exports/model.int8.onnx"' in card
    assert "library_name: onnx" in card
    assert "always answers with one of its classes" in card


@pytest.mark.parametrize(
    "row",
    [REFUSED, MANIFEST["exports"][0] | {"file": "model.baked.onnx", "format": "onnx_baked"}],
    ids=["refused", "takes images as they are"],
)
def test_the_model_card_shows_no_code_for_a_file_that_cannot_be_used_so(write_run, row):
    run = write_run(manifest=MANIFEST | {"exports": [row]})
    report.write_report(run)
    assert "import onnxruntime" not in run.model_card.read_text()


def test_a_file_that_nothing_could_be_measured_of_is_there(write_run):
    run = write_run(manifest=MANIFEST | {"exports": [REFUSED | {"agreement": None}]})
    report.write_report(run)
    assert "`model.onnx` takes `images`" in run.model_card.read_text()


def test_the_model_card_of_several_labels_answers_with_those_that_reach_the_threshold(write_run):
    data = {"path": "/x", "task": "multi_label", "threshold": 0.3}
    run = write_run(recipe=RECIPE | {"data": data, "train": {"loss": "binary_cross_entropy"}})
    report.write_report(run)
    card = run.model_card.read_text()
    assert "if p >= 0.3])" in card
    assert "argmax" not in card
    assert "always answers" not in card
    assert "answers with those from 0.3 on, which may be none" in card


def test_random_weights_and_a_watched_training_loss_are_told_as_they_are(write_run):
    recipe = RECIPE | {"model": {"weights": None}, "data": {"name": "digits"}}
    run = write_run(recipe=recipe, status=STATUS | {"best": BEST | {"metric": "train/loss"}})
    report.write_report(run)
    card = run.model_card.read_text()
    assert "resnet50, trained from random weights." in card
    assert "scikit-learn's images of digits" in card
    assert "chose the checkpoint" not in card
    assert "biases of the weights" not in card


@pytest.mark.parametrize(
    ("fraction", "samples", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0)]
)
def test_the_interval_is_wilsons(fraction, samples, low, high):
    assert intervals.wilson_interval(fraction, samples) == pytest.approx((low, high), abs=5e-5)


def test_the_code_of_the_model_card_runs_and_names_the_class(write_run, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    from PIL import Image

    run = write_run()
    report.write_report(run)
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "channel_means",
        [helper.make_tensor_value_info("images", real, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", real, ["N", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, run.exports / "model.onnx")
    # Blue only in the centre that the crop leaves of this wide picture: red outside would win.
    pixels = np.zeros((40, 120, 3), dtype=np.uint8)
    pixels[:, :, 0] = 255
    pixels[:, 38:82] = (0, 0, 255)
    Image.fromarray(pixels).save(run.path / "photo.jpg", quality=95)
    monkeypatch.chdir(run.path)
    (code,) = re.findall(r"```python\n(.*?)```", run.model_card.read_text(), re.DOTALL)
    exec(compile(code, "model_card.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out == "fox\n"


def test_a_report_costs_no_torch_and_jinja2_only_where_one_is_written():
    code = (
        "import sys; import launcher.report.build; print('jinja2' in sys.modules)"
        "; import launcher.report.html, launcher.report.model_card"
        "; print('torch' in sys.modules, 'rich' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "False\nFalse False\n"


# Images that were left out


def bad_images(num, *, leaked=0):
    images = [
        {"path": f"train/<cat>/{i}\udcff.png", "split": "train", "kind": "not_an_image", "message": NASTY}
        | {"since_attempt": 1}
        for i in range(num)
    ]
    return {"version": 1, "attempt": 1, "scanned": 1000, "leaked": leaked, "images": images}


@pytest.mark.parametrize("content", [None, bad_images(0)])
def test_without_bad_images_nothing_is_said_of_them(write_run, content):
    run = write_run()
    if content:
        run.bad_images.write_text(json.dumps(content))
    data, page = written(run)
    assert data["bad_images"] == (content and {"scanned": 1000, "leaked": 0, "images": []})
    assert "Bad images" not in page
    assert "cannot be decoded" not in run.model_card.read_text()
    assert data["missing"] == []


def test_bad_images_are_listed_with_nothing_in_their_names_taken_for_html(write_run):
    run = write_run()
    run.bad_images.write_text(json.dumps(bad_images(2)))
    data, page = written(run)
    assert [image["path"] for image in data["bad_images"]["images"]] == [f"train/<cat>/{i}\udcff.png" for i in range(2)]
    assert "2 of 1,000 images cannot be decoded" in " ".join(Page(page).text_of("caption"))
    assert "train/<cat>/1\\udcff.png" in Page(page).text_of("th")
    assert "not an image" in Page(page).text_of("td")
    assert "<cat>" not in page
    assert "2 images that cannot be decoded took no part" in run.model_card.read_text()


def test_of_very_many_bad_images_the_page_shows_some(write_run):
    run = write_run()
    run.bad_images.write_text(json.dumps(bad_images(500)))
    _, page = written(run)
    assert page.count("&lt;cat&gt;") == 200
    assert "500 of 1,000 images cannot be decoded and have no part in this; the others are in bad_images.json" in page


def test_validation_images_in_training_are_told_in_the_page_and_the_card(write_run):
    run = write_run()
    run.bad_images.write_text(json.dumps(bad_images(0, leaked=7)))
    _, page = written(run)
    assert "7 of the validation images are training images too" in page
    assert "7 of the validation images are training images too" in run.model_card.read_text()


def tuned(num_ranks):
    rank = {"host": "<n1>", "device": "H100", "images_per_s": 2500.0, "needed_bytes": 40e9, "budget_bytes": 76e9}
    sizes = [256] * num_ranks
    batching = {"batch_sizes": sizes, "shares": sizes, "global_batch_size": sum(sizes)}
    return {"version": 1, "batching": batching, "ranks": [{**rank, "rank": number} for number in range(num_ranks)]}


def test_batch_sizes_that_were_measured_and_memory_that_ran_out_are_in_the_report(write_run):
    run = write_run()
    data, page = written(run)
    assert data["batch_sizes"] is None
    assert "Batch sizes" not in page
    run.tuning.write_text(json.dumps(tuned(100)))
    run.append_event("out_of_memory", attempt=1, step=7, batch_sizes={"3": [256, 128]})
    data, page = written(run)
    assert data["batch_sizes"]["tuned"]["batching"]["global_batch_size"] == 25600
    assert data["batch_sizes"]["out_of_memory"] == [{"attempt": 1, "step": 7, "batch_sizes": {"3": [256, 128]}}]
    assert "&lt;n1&gt;: H100" in page
    assert "rank 3 from 256 to 128" in page
    assert "The first 64 of 100 ranks" in page


def test_the_test_set_is_the_recipes_last_measured_by_the_best_checkpoint():
    def line(name, step, top1):
        return {"split": "test", "test_set": name, "step": step, "samples": 4, "top1": top1}

    lines = [line("test", 8, 0.1), line("holdout", 4, 0.2), line("holdout", 8, 0.3), {"split": "val", "step": 8}]

    def found(name, step=8):
        of = test_set.of_run(lines, {"step": step}, METRIC_NAMES, {"data": {"test": name}})
        return of and (of["split"], of["values"]["top1"])

    assert (found("test"), found("holdout")) == (("test", 0.1), ("holdout", 0.3))
    assert (found("holdout", 4), found("test", 4), found(None)) == (("holdout", 0.2), None, None)
    del lines[0]["test_set"]  # of a launcher before it was written
    assert found("test") == ("test", 0.1)
