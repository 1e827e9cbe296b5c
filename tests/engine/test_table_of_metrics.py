"""The table of metrics: one row more, and all that show or watch metrics have it."""

from __future__ import annotations

import io
import json

import pytest
import torch

from launcher.commands import compare
from launcher.engine.listeners.recorder import Recorder
from launcher.engine.losses import Loss, cross_entropy
from launcher.engine.validating.totals import ValidationTotals
from launcher.errors import RecipeError
from launcher.recipe import load as recipes
from launcher.recipe import metrics as recipe_metrics
from launcher.recipe.metrics import METRICS, Counts, Metric
from launcher.report import build as report
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl
from launcher.tracking.records import Feed

WATCHED = "data: {name: digits}\ntrain: {early_stopping: {metric: val/balanced, mode: max}}\n"
WATCHED += "tracking: {wandb: {mode: disabled}}\n"


def balanced(counts):
    """Mean recall of the classes that occur."""
    recalls = [hits / true for hits, true in zip(counts.hits, counts.true, strict=True) if true]
    return sum(recalls) / len(recalls)


@pytest.fixture
def one_row_more(monkeypatch):
    row = Metric(title="balanced accuracy", mode="max", value=balanced, fraction=True, charted=True)
    monkeypatch.setitem(METRICS, "balanced", row)


def test_without_the_row_it_cannot_be_watched(recipe_file):
    with pytest.raises(RecipeError, match=r"found 'val/balanced'; no such metric;.* valid: train/loss, val/loss"):
        recipes.load(str(recipe_file(WATCHED)))


def test_a_row_is_all_that_a_new_metric_needs(one_row_more, one_rank, recipe_file, tmp_path, capsys):
    recipe, _ = recipes.load(str(recipe_file(WATCHED)))
    assert recipe.train.early_stopping.metric == "val/balanced"

    totals = ValidationTotals(["a", "b"], torch.device("cpu"), Loss("cross_entropy", cross_entropy, {}))
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    totals.add(logits, torch.tensor([0, 0, 1, 1]))
    values = totals.compute()
    assert values["balanced"] == 0.75

    run = RunDir(tmp_path / "run")
    run.create()
    recorder = Recorder(run, recipe, attempt=1, console=io.StringIO(), num_steps=4)
    recorder.validation(epoch=0, step=4, values=values, best=True)
    assert "balanced 0.7500" in recorder._console.getvalue()
    (line,) = read_jsonl(run.metrics)
    assert line["balanced"] == 0.75
    (record,) = Feed(run, recipe).new()
    assert record.values["val/balanced"] == 0.75

    run.recipe.write_text(recipes.to_yaml(recipe))
    facts = {"backend": "local", "device": "cpu", "nodes": 1, "procs_per_node": 1, "world_size": 1, "command": []}
    run.plan.write_text(json.dumps({"run_id": "r", "name": "r", "created": 0.0, "host": "h", **facts}))
    best = {"metric": "val/balanced", "value": 0.75, "epoch": 0, "step": 4}
    run.update_status(state="completed", best=best)
    report.write_report(run)
    page, card = run.report_html.read_text(), run.model_card.read_text()
    assert page.count("alanced accuracy") > 1
    assert "75.00%" in page
    assert "| balanced accuracy | 0.7500 |" in card

    capsys.readouterr()
    compare.run([str(run.path)], metric="val/balanced", as_json=True)
    table = json.loads(capsys.readouterr().out)
    assert (table["mode"], table["runs"][0]["best"]["value"]) == ("max", 0.75)


def test_a_recipes_own_metrics_are_rows_with_the_names_that_they_give():
    rows = ["a.py:Ece", {"metric": "b.c:f", "name": "mine", "mode": "min"}]
    assert recipe_metrics.watchable(rows)["val/Ece"] == "max"
    assert recipe_metrics.watchable(rows)["val/mine"] == "min"
    assert list(recipe_metrics.configs(recipes.from_dict({"metrics": rows}).metrics)) == ["Ece", "mine"]


@pytest.mark.parametrize("nonsense", [None, "text", [1, {"metric": None}, {"mode": "up"}, [], {}], {"a": 1}])
def test_a_damaged_recipe_of_a_run_has_no_own_metrics(nonsense):
    """`launch compare` reads whatever lies there."""
    assert set(recipe_metrics.of(nonsense)) >= set(METRICS)


def test_a_value_that_is_no_number_is_recorded_as_null_and_named(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    recipe = recipes.from_dict({"metrics": ["a.py:odd"]})
    recorder = Recorder(run, recipe, attempt=1, console=io.StringIO(), num_steps=4)
    values = {"samples": 4, "loss": 1.0, "top1": 0.5, "top5": 1.0, "f1": 0.5, "odd": float("nan")}
    recorder.validation(epoch=0, step=4, values=values, best=False)
    (line,) = read_jsonl(run.metrics)
    assert line["odd"] is None
    assert "odd nan" in recorder._console.getvalue()


def test_where_no_image_has_a_class_and_none_is_predicted_there_is_nothing_right():
    counts = Counts(samples=4, loss=2.0, top_k=0, hits=[0, 0], true=[0, 0], predicted=[0, 0], first=0)
    found = {name: metric.value(counts) for name, metric in METRICS.items() if not metric.ranked and name != "ece"}
    assert found.pop("loss") == 0.5
    assert set(found.values()) == {0.0}
