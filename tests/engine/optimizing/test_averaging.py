"""The moving average of the weights, in real trainings."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.metrics import BestMetric
from launcher.engine.optimizing.averaging import WeightAverage, decay_at
from launcher.tools import evaluate

NET = {"arch": "shufflenet_v2_x0_5"}


def test_it_follows_quickly_in_the_beginning_and_then_as_the_recipe_says():
    assert [decay_at(step, 0.9) for step in (0, 8, 80, 1000)] == [0.1, 0.5, 0.9, 0.9]


def test_it_is_that_by_hand():
    net = torch.nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    average, expected = WeightAverage(net, 0.5), None
    for step in range(20):
        with torch.no_grad():
            net.weight.normal_()
        average.update(step)
        decay = decay_at(step, 0.5)
        expected = net.weight.clone() if expected is None else decay * expected + (1 - decay) * net.weight
    torch.testing.assert_close(average.saved()["weight"], expected)
    assert torch.equal(average.saved()["bias"], net.bias)


def test_of_swa_it_is_the_mean_of_all_steps_from_an_epoch_on():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average, seen, recomputed = WeightAverage(net, None, 1), [], []
    for step in range(12):
        with torch.no_grad():
            for tensor in (net[0].weight, net[1].running_mean):
                tensor.normal_()
        average.update(step, step // 4)
        seen.append([net[0].weight.clone(), net[1].running_mean.clone()])
        assert (average.saved() is None) == (step < 4)
    saved = average.saved()
    assert average.num == 8
    for name, values in zip(("0.weight", "1.running_mean"), zip(*seen[4:], strict=True), strict=True):
        torch.testing.assert_close(saved[name], torch.stack(values).mean(dim=0))
    values = average.beside(lambda **of: recomputed.append(of), lambda: {"top1": 0.5, "examples": []})
    assert (values, recomputed) == ({"top1": 0.5, "examples": [], "swa_top1": 0.5}, [{}, {"of_mean": True}])
    follower, moving, later = (WeightAverage(net, None, after) for after in (1, 1, 8))
    follower.restore(saved, average.num, 3)
    moving.restore(saved, 0, 3)  # a moving average is no mean of so many
    later.restore(saved, average.num, 3)  # it was of the steps after epoch 1
    for one in (average, follower):
        one.update(12, 3)
    assert moving.saved() is later.saved() is None
    later.update(40, 8)
    assert later.num == 1
    assert all(torch.equal(value, average.saved()[name]) for name, value in follower.saved().items())


def test_without_a_decay_there_is_none():
    net = torch.nn.Linear(3, 2)
    average = WeightAverage(net, None)
    average.update(0)
    assert average.saved() is None
    assert average.beside(lambda: None, lambda: {"loss": 1.0}) == {"loss": 1.0}


@pytest.mark.parametrize("fails", [False, True])
def test_after_validation_the_model_is_what_it_was(fails):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    average, seen = WeightAverage(net, 0.5), []
    for step in range(3):
        with torch.no_grad():
            net[0].weight.normal_()
        average.update(step)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    saved = {name: value.clone() for name, value in average.saved().items()}

    def validate():
        seen.append(net[0].weight.clone())
        net[1].running_mean.add_(len(seen))  # as computing the statistics anew does; the average has its own
        if fails and len(seen) == 2:
            raise KeyboardInterrupt
        return {"loss": float(len(seen)), "samples": 3, "confusion": []}

    try:
        values = average.beside(lambda **_: None, validate)
    except KeyboardInterrupt:
        assert fails
    else:
        assert values == {"loss": 1.0, "samples": 3, "confusion": [], "ema_loss": 2.0, "ema_confusion": []}
        assert torch.equal(average.saved()["1.running_mean"], before["1.running_mean"] + 2)
    before["1.running_mean"] += 1
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(seen[1], saved["0.weight"])
    assert torch.equal(average.saved()["0.weight"], saved["0.weight"])


@pytest.mark.parametrize(
    ("mode", "raw", "average", "value", "weights"),
    [
        ("max", 0.5, 0.6, 0.6, "ema"),
        ("max", 0.6, 0.5, 0.6, None),
        ("min", 0.5, 0.4, 0.4, "ema"),
        ("max", 0.5, 0.5, 0.5, None),
    ],
)
def test_the_better_of_both_is_the_best(mode, raw, average, value, weights):
    best = BestMetric(metric="val/x", mode=mode, min_delta=0.0, patience=None)
    assert best.take({"val/x": raw, "val/ema_x": average}, epoch=0, step=1)
    assert (best.best["value"], best.best.get("weights")) == (value, weights)


def test_the_exports_are_made_from_what_validated_better(make_run, engine, one_rank):
    watched = {"metric": "val/loss", "mode": "min", "patience": None}
    train = {"epochs": 2, "ema": 0.9, "early_stopping": watched}
    run = make_run(model=NET, batch={"size": 6}, optim={"lr": 0.1}, train=train)
    found = engine.train(run)
    lines = [line for line in found.lines if line["split"] == "val"]
    assert all({"ema_loss", "ema_top1", "ema_f1"} < line.keys() for line in lines)
    best = min((line[name], name) for line in lines for name in ("loss", "ema_loss"))
    assert found.best["value"] == best[0]
    assert found.best.get("weights") == ("ema" if best[1] == "ema_loss" else None)
    manifest = json.loads((run.best_checkpoint / checkpoints.MANIFEST).read_text())
    assert checkpoints.AVERAGE in manifest["files"]
    exported = evaluate.load_best(run).module.state_dict()
    saved = checkpoints.load(run.best_checkpoint)
    expected = saved.average if best[1] == "ema_loss" else saved.model
    assert engine.identical(dict(exported), {name: expected[name] for name in exported})
    for weights, of in (("ema", saved.average), (None, saved.model)):
        state = saved.state | {"early_stopping": {"best": {"weights": weights}}}
        assert replace(saved, state=state).best_weights is of
    (run.best_checkpoint / checkpoints.AVERAGE).write_bytes(b"damaged")
    with pytest.raises(checkpoints.CheckpointError, match="ema"):
        checkpoints.load(run.best_checkpoint)


@pytest.mark.slow
def test_a_run_that_had_no_average_goes_on_with_one(make_run, engine, one_rank):
    run = make_run(model=NET, batch={"size": 18}, train={"epochs": 2})
    engine.train(run, stop=engine.at_poll(4))
    text = run.recipe.read_text()
    assert "ema: null" in text
    run.recipe.write_text(text.replace("ema: null", "ema: 0.9"))
    found = engine.train(run)
    assert found.outcome == "completed"
    assert "ema_loss" in found.lines[-1]
