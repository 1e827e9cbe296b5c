"""Going on with another recipe: its settings are used, and what training has changed is the checkpoint's."""

from __future__ import annotations

import pytest
import torch

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.distributed import Ranks
from launcher.engine.metrics import BestMetric
from launcher.engine.setup import build_parts
from launcher.engine.state import TrainingState
from launcher.recipe import load as recipes

START = {"batch": {"size": 12}, "optim": {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}, "train": {"epochs": 1}}


def change(run, **sections):
    """Write the run's recipe anew with other values."""
    values = recipes.to_dict(recipes.read_resolved(run.recipe))
    for section, changed in sections.items():
        values[section] = {**values[section], **changed} if isinstance(changed, dict) else changed
    run.recipe.write_text(recipes.to_yaml(recipes.from_dict(values)))


def restored(run, device):
    """What a run would train with: its parts, and the checkpoint that they were restored from."""
    parts = build_parts(run, Ranks(), device)
    state = TrainingState(parts)
    found = checkpoints.load_newest(run)
    state.restore(found)
    return parts, found


def by_name(parts):
    """The optimizer's state of each parameter."""
    names = {parameter: name for name, parameter in parts.model.module.named_parameters()}
    return {names[parameter]: state for parameter, state in parts.optimizer.state.items()}


@pytest.fixture
def stopped(make_run, engine, one_rank):
    """A run that was stopped after two steps, begun with some recipe."""

    def make(**changes):
        run = make_run(**{**START, **changes})
        assert engine.train(run, stop=engine.at_poll(2)).step == 2
        return run

    return make


def test_rates_and_settings_are_this_calls_and_momentum_is_the_checkpoints(stopped, engine):
    run = stopped()
    change(run, optim={"lr": 0.001, "momentum": 0.5, "weight_decay": 0.5})
    parts, saved = restored(run, engine.cpu)
    (group,) = parts.optimizer.param_groups
    assert (group["peak_lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.001, 0.5, 0.5, True)
    buffers = [state["momentum_buffer"] for state in parts.optimizer.state.values()]
    kept = [saved.optimizer["optimizer"]["state"][i]["momentum_buffer"] for i in range(len(buffers))]
    assert all(map(torch.equal, buffers, kept))
    assert any(buffer.any() for buffer in buffers)
    found = engine.train(run)
    assert {line["lr"] for line in found.lines if line["split"] == "train"} == {0.001}


def test_the_settings_of_adamw_are_those_of_this_call(stopped, engine):
    run = stopped(optim={"name": "adamw", "lr": 0.001, "weight_decay": 0.1})
    change(run, optim={"lr": 0.01, "weight_decay": 0.0})
    parts, _ = restored(run, engine.cpu)
    (group,) = parts.optimizer.param_groups
    assert (group["peak_lr"], group["weight_decay"], group["fused"]) == (0.01, 0.0, True)
    assert {int(state["step"]) for state in parts.optimizer.state.values()} == {2}
    assert engine.train(run).outcome == "completed"


def as_an_earlier_version_saved_it(run):
    """Groups without the names of their parameters, and no recipe."""
    found = checkpoints.load_newest(run)
    for group in found.optimizer["optimizer"]["param_groups"]:
        del group["names"]
    del found.state["recipe"]
    checkpoints.write(run, found)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "groups", [{}, {"head": 0.5, "*": 0.01}, {"features.1[0-2]": 0.3, "features": 0.2}, {"*": 0.1}], ids=str
)
def test_other_groups_keep_the_state_of_every_parameter(stopped, engine, groups, name, earlier):
    run = stopped(optim={"name": name, "lr": 0.002, "groups": {"features.3": 0.004, "head": 0.02}})
    if earlier:
        as_an_earlier_version_saved_it(run)
    before = by_name(restored(run, engine.cpu)[0])
    change(run, optim={"groups": groups})
    parts, saved = restored(run, engine.cpu)
    after = by_name(parts)
    assert after.keys() == dict(parts.model.module.named_parameters()).keys()
    assert engine.identical(after, before)
    assert {group["name"]: group["peak_lr"] for group in parts.optimizer.param_groups} == {
        **groups,
        **({} if "*" in groups else {"rest": 0.002}),
    }
    shapes = [p.shape for group in parts.optimizer.param_groups for p in group["params"]]
    assert sorted(shapes) == sorted(p.shape for p in saved.model.values())


def test_a_checkpoint_of_an_earlier_version_gives_the_same_bits(make_run, engine, one_rank, stopped):
    groups = {"optim": {"lr": 0.02, "groups": {"features.3": 0.004, "head": 0.02}}}
    whole = engine.train(make_run("whole", **{**START, **groups}))
    run = stopped(**groups)
    as_an_earlier_version_saved_it(run)
    found = engine.train(run)
    assert engine.identical(found.state, whole.state)
    assert engine.identical(found.optimizer, whole.optimizer)


def test_a_momentum_that_was_off_for_a_while_begins_from_nothing(stopped, engine):
    run = stopped()
    change(run, optim={"momentum": 0.0})
    parts, _ = restored(run, engine.cpu)
    assert not parts.optimizer.state
    assert engine.train(run, stop=engine.at_poll(1)).step == 3
    change(run, optim={"momentum": 0.9})
    assert not restored(run, engine.cpu)[0].optimizer.state
    assert engine.train(run).outcome == "completed"


def test_what_was_frozen_learns_and_what_learned_is_frozen(stopped, engine):
    run = stopped(model={"freeze": ["features"]})
    change(run, model={"freeze": ["features.[0-5]"]})
    assert engine.train(run, stop=engine.at_poll(1)).step == 3
    change(run, model={"freeze": ["backbone"]})
    assert engine.train(run).outcome == "completed"


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "fp32"), ("bf16", "fp32")])
def test_the_precision_may_change(make_run, engine, one_rank, before, after):
    run, device = make_run(**START, precision=before), engine.from_scale(256.0)
    state = TrainingState(build_parts(run, Ranks(), device))
    captured = state.capture()
    state.finish_capture()
    checkpoints.write(run, captured)
    change(run, precision=after)
    parts, _ = restored(run, device)
    assert parts.precision == after


def test_what_is_best_by_another_metric_does_not_stand_in_the_way_of_this_one():
    before = BestMetric(metric="val/loss", mode="min", min_delta=0, patience=5)
    for value in (2.3, 2.4):
        before.update(value, epoch=0, step=1)
    now = BestMetric(metric="val/top1", mode="max", min_delta=0, patience=5)
    now.restore(before.state())
    assert (now.best, now.waited) == (None, 0)
    assert now.update(0.5, epoch=2, step=3)
    same = BestMetric(metric="val/loss", mode="min", min_delta=0, patience=1)
    same.restore(before.state())
    assert same.best["value"] == 2.3
    assert same.exhausted
