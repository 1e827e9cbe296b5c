"""Runs with a user's own loss, metrics and listeners, through the command line and real gloo groups."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torchmetrics.classification  # noqa: F401  once here, and not in each process that tests fork
import yaml
from safetensors.torch import load_file

from launcher import cli
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl
from tests.nets import FACTORY

EXTENDING = Path(__file__).parents[3] / "docs" / "extending.md"
CODE = """
import json
import os
from pathlib import Path

import torch
from torch.nn import functional


def loss(logits, targets, gamma=2.0):
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return (1 - (-losses).exp()) ** gamma * losses


def mean(logits, targets):
    return functional.cross_entropy(logits, targets)


def margin(probabilities, targets):
    top = probabilities.topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]).double().mean()


def worse(probabilities, targets):
    worse.calls = getattr(worse, "calls", 0) + 1
    return float(-worse.calls)


class Told:
    def start(self, run_dir, step, world_size):
        self.file = Path(run_dir) / "told.jsonl"
        self.tell("start", step=step, world_size=world_size)

    def tell(self, event, **values):
        with self.file.open("a") as file:
            file.write(json.dumps({"event": event, "pid": os.getpid(), **values}) + "\\n")

    def step(self, step, values):
        self.tell("step", step=step, loss=values["loss"])

    def validation(self, step, values, best):
        self.tell("validation", step=step, best=best, names=sorted(values))

    def checkpoint(self, step, path):
        self.tell("checkpoint", step=step, there=Path(path).is_dir())

    def end(self, outcome, best):
        self.tell("end", outcome=outcome, metric=best["metric"])


def broken_loss(logits, targets):
    raise RuntimeError("theirs")


class Broken:
    def step(self, values):
        raise RuntimeError("theirs")


class BrokenLater:
    def __init__(self):
        self.calls = 0

    def __call__(self, logits, targets):
        self.calls += 1
        if self.calls > 6:
            raise RuntimeError("theirs")
        return functional.cross_entropy(logits, targets)


def vector(logits, targets):
    return logits


def detached(logits, targets):
    return functional.cross_entropy(logits.detach(), targets)


def one(logits):
    return logits.sum()
"""
RECIPE = {
    "model": {"factory": FACTORY.partition("=")[2]},
    "data": {"image_size": 32, "crop_pct": 1.0, "augment": "none", "workers": 0},
    "batch": {"size": 3},
    "optim": {"lr": 0.005, "schedule": "constant"},
    "precision": "fp32",
    "train": {"epochs": 2, "checkpoint": {"every_minutes": None}, "early_stopping": {"patience": None}},
    "tracking": {"wandb": {"mode": "disabled"}, "log_every": 2},
    "post": {"enabled": False},
    "launch": {"device": "cpu"},
}
AUROC = "torchmetrics.classification:MulticlassAUROC"
ECE = {"name": "calibration", "metric": "torchmetrics.classification:MulticlassCalibrationError", "mode": "min"}


def merge(base, changes):
    return {
        **base,
        **{
            k: merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
            for k, v in changes.items()
        },
    }


@pytest.fixture
def recipe(recipe_file, images):
    """Write a recipe beside the user's file; return its path."""

    def write(code=CODE, **changes):
        path = recipe_file(yaml.safe_dump(merge(merge(RECIPE, {"data": {"path": str(images)}}), changes)), "mine.yaml")
        (path.parent / "my.py").write_text(code)
        return str(path)

    return write


@pytest.fixture
def start(warm_launch, recipe, tmp_path):
    """Run a recipe beside the user's file; return the finished process and the run."""

    def call(*arguments, name="run", code=CODE, **changes):
        path = recipe(code, **changes)
        done = warm_launch(path, "--run-dir", str(tmp_path / name), *arguments)
        return done, RunDir(tmp_path / name)

    return call


TIMED = ("time", "attempt", "images_per_s", "data_wait", "memory_mb", "slowest_rank", "slowest_behind")
"""What is not the same in two runs of the same bits."""
OWN = {
    "train": {"loss": "my.py:loss", "loss_args": {"gamma": 1.0}, "listeners": ["my.py:Told"]}
    | {"early_stopping": {"metric": "val/calibration", "mode": "min", "patience": None}},
    "metrics": [ECE, AUROC, "my.py:margin"],
}


@pytest.mark.slow
def test_they_train_measure_and_hear_and_are_shown_wherever_top_1_is(start, launch):
    changes = merge(OWN, {"tracking": {"wandb": {"mode": "offline"}}})
    done, run = start("--procs", "2", **changes)
    assert done.returncode == 0, done.stderr
    lines = [line for line in read_jsonl(run.metrics) if line["split"] == "val"]
    assert len(lines) == 2
    assert all({"calibration", "MulticlassAUROC", "margin"} <= set(line) for line in lines)
    assert re.search(r"val  loss .*top1 .*calibration .*MulticlassAUROC .*margin", done.stdout)
    best = run.read_status()["best"]
    assert (best["metric"], best["value"]) == ("val/calibration", min(line["calibration"] for line in lines))
    report = json.loads(run.report_json.read_text())
    assert report["best_val"]["calibration"] == best["value"]
    page, card = run.report_html.read_text(), run.model_card.read_text()
    assert "calibration over" in page
    assert "MulticlassAUROC" in page
    assert f"| calibration | {best['value']:.4f} |" in card
    (record,) = run.wandb.rglob("run-*.wandb")
    assert b"val/calibration" in record.read_bytes()
    compared = launch("compare", str(run.path), "--metric", "val/calibration")
    assert compared.returncode == 0, compared.stderr
    assert f"{best['value']:.4f}" in compared.stdout
    told = list(read_jsonl(run.path / "told.jsonl"))
    assert len({line["pid"] for line in told}) == 1  # rank 0's alone
    assert [line["event"] for line in told if line["event"] != "step"] == [
        *("start", "validation", "checkpoint", "validation", "checkpoint", "end")
    ]
    assert all(line["there"] for line in told if line["event"] == "checkpoint")
    windows = [line for line in read_jsonl(run.metrics) if line["split"] == "train"]
    assert [(line["step"], line["loss"]) for line in told if line["event"] == "step"] == [
        (line["step"], line["loss"]) for line in windows
    ]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["loss", "mean"])
def test_one_and_two_ranks_learn_and_measure_the_same(make_run, engine, in_ranks, tmp_path, monkeypatch, loss):
    """With an uneven last batch, accumulation, and a validation set that two ranks cannot share evenly."""
    (tmp_path / "theirs.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"train": {"loss": f"theirs:{loss}", "epochs": 2}, "metrics": [ECE, "theirs:margin"]}
    changes |= {"batch": {"size": 4, "global_size": 8}, "optim": {"lr": 0.005}}
    changes["model"] = {"arch": "shufflenet_v2_x0_5", "freeze": ["backbone"]}  # nothing random, no batch statistics
    runs = {size: make_run(f"run-{size}", **changes) for size in (1, 2)}
    one, two = (in_ranks(size, lambda who: engine.train(runs[who.world_size], who))[0] for size in runs)
    measured = [[line for line in found.lines if line["split"] == "val"] for found in (one, two)]
    for first, second in zip(*measured, strict=True):
        for name in ("loss", "calibration", "margin", "top1"):
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
    assert engine.largest_difference(one.state, two.state) < 1e-5
    assert not engine.identical(one.state, one.initial)


@pytest.mark.slow
@pytest.mark.parametrize("procs", [1, 2])
def test_a_resumed_run_ends_with_the_same_bits(start, procs):
    flags = ("--procs", str(procs))
    done, whole = start(*flags, name="whole", **OWN)
    assert done.returncode == 0, done.stderr
    done, run = start(*flags, name="stopped", **merge(OWN, {"train": {"epochs": 1}}))
    assert done.returncode == 0, done.stderr
    done, run = start(*flags, "--resume", name="stopped", **OWN)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(each.last_checkpoint / "model.safetensors") for each in (whole, run))
    assert all(torch.equal(one[name], other[name]) for name in one)
    values = [
        [{k: v for k, v in line.items() if k not in TIMED} for line in read_jsonl(each.metrics)]
        for each in (whole, run)
    ]
    assert values[0] == values[1]


@pytest.mark.slow
def test_early_stopping_watches_a_metric_of_the_users(start):
    stopping = {"metric": "val/worse", "mode": "max", "patience": 2}
    done, run = start(metrics=["my.py:worse"], train={"epochs": 9, "early_stopping": stopping})
    assert done.returncode == 0, done.stderr
    status = run.read_status()
    assert (status["state"], status["epoch"], status["best"]["epoch"]) == ("early_stopped", 3, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"loss": "my.py:broken_loss"}},
        {"train": {"loss": "my.py:BrokenLater"}},
        {"train": {"listeners": ["my.py:Broken"]}},
        {"metrics": ["my.py:broken_loss"]},
    ],
    ids=str,
)
def test_an_exception_of_theirs_is_shown_and_not_tried_again(start, changes):
    done, run = start(**changes)
    assert done.returncode == 1
    assert 'raise RuntimeError("theirs")' in done.stderr
    assert re.search(r"my\.py:\d+, the last line of your own code", done.stderr)
    assert len([event for event in read_jsonl(run.events) if event["kind"] == "attempt_started"]) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"loss": "crossentropy"}}, r"mine\.yaml:\d+: train\.loss: .*did you mean 'cross_entropy'"),
        ({"train": {"loss": "my.py:lost"}}, r"train\.loss: .*did you mean 'loss'"),
        ({"train": {"loss": "my.py:one"}}, r"train\.loss: .*my\.py:\d+: one takes 1 arguments by position"),
        ({"train": {"loss": "focal", "loss_args": {"gama": 1}}}, "did you mean 'gamma'"),
        ({"metrics": [{"metric": AUROC, "name": "top1"}]}, r"metrics\.0: the name 'top1' is taken"),
        ({"metrics": [AUROC, AUROC]}, r"mine\.yaml:\d+: metrics\.1: the name 'MulticlassAUROC' is taken by another"),
        ({"metrics": ["torchmetrics.classification:MulticlassAUROK"]}, "did you mean 'MulticlassAUROC'"),
        (
            {"train": {"early_stopping": {"metric": "val/calibrationn"}}, "metrics": [ECE]},
            "did you mean 'val/calibration'",
        ),
        ({"train": {"early_stopping": {"metric": "val/calibration", "mode": "max"}}, "metrics": [ECE]}, "valid: min"),
        ({"train": {"listeners": ["my.py:Tolds"]}}, r"train\.listeners\.0: .*did you mean 'Told'"),
        ({"train": {"listeners": [{"listener": "my.py:Told", "args": {"a": 1}}]}}, "does not take 'a'|takes no"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_with_its_place_before_torch_is_imported(recipe, launch, changes, words):
    done = launch(recipe(**changes), "--run-dir", "run", "--dry-run")
    assert done.returncode == 2
    assert re.search(words, done.stderr), done.stderr
    assert not (launch.cwd / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"loss": "my.py:vector"}}, r"train\.loss: my\.py:vector returned a tensor of shape \(12, 3\)"),
        ({"train": {"loss": "my.py:detached"}}, r"train\.loss: my\.py:detached returned a tensor that no gradient"),
        ({"train": {"loss": "focal", "label_smoothing": 0.1}}, "focal takes no label_smoothing"),
        ({"metrics": [{**ECE, "mode": "max"}]}, r"metrics\.0: .*less of it is better; write mode: min"),
        ({"metrics": [{"metric": AUROC, "args": {"num_classes": -2}}]}, r"metrics\.0: .*ValueError"),
        ({"metrics": ["my.py:vector"]}, r"metrics\.0: my\.py:vector gives a tensor of shape"),
        ({"train": {"listeners": [AUROC]}}, r"train\.listeners\.0: .*has no method that is called"),
    ],
    ids=str,
)
def test_what_only_shows_when_it_runs_is_refused_before_the_start(
    recipe, changes, words, tmp_path, monkeypatch, capsys
):
    """In this process, which has torch already."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main([recipe(**changes), "--run-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert re.search(words, said), said
    assert not (tmp_path / "run").exists()


def examples():
    """The examples of docs/extending.md: the name of each, its file and its content, its recipe."""
    pattern = r"<!-- example: (loss|metrics|listeners) -->\n```python\n# (\S+)\n(.*?)```.*?```yaml\n(.*?)```"
    return re.findall(pattern, EXTENDING.read_text(), re.DOTALL)


def test_the_examples_of_the_documentation_are_found():
    assert [found[0] for found in examples()] == ["loss", "metrics", "listeners"]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "file", "code", "section"), examples(), ids=lambda value: value[:9])
def test_an_example_of_the_documentation_runs(start, recipe_file, part, file, code, section):
    recipe_file(code, name=file)
    changes = merge(yaml.safe_load(section), {})
    changes.setdefault("train", {})["epochs"] = 1
    done, run = start("--procs", "2", **changes)
    assert done.returncode == 0, done.stderr
    if part == "listeners":
        assert json.loads((run.path / "diary.jsonl").read_text())["world_size"] == 2


@pytest.mark.slow
def test_torchmetrics_is_not_imported_where_no_recipe_names_metrics(recipe, launch):
    code = (
        CODE + "\nimport sys\n\n\nclass Look:\n    def end(self):\n        assert 'torchmetrics' not in sys.modules\n"
    )
    path = recipe(code, train={"epochs": 1, "listeners": ["my.py:Look"]})
    done = launch(path, "--run-dir", "run", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
