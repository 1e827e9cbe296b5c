"""BatchNorm's running statistics, computed anew before a validation, with real models and process groups."""

from __future__ import annotations

import io

import pytest
import torch

from launcher.engine.checkpoints.checkpoint import load
from launcher.engine.distributed import Ranks
from launcher.engine.layers import batch_norms
from launcher.engine.setup import build_parts
from launcher.system import phases
from launcher.system.files import read_jsonl
from tests.nets import NET

SLOW_STATISTICS = {"model": NET, "batch": {"size": 6}}  # momentum 0.01
STATISTICS = ("running_mean", "running_var")


def recomputed(run):
    return [event for event in read_jsonl(run.events) if event["kind"] == "batchnorm_recomputed"]


def statistics(state):
    return {name: value for name, value in state.items() if name.endswith(STATISTICS)}


@torch.no_grad()
def by_hand(run, state, engine, *, num, size):
    """Means over batches of what torch's own running average, with a weight of 1, takes from each."""
    parts = build_parts(run, Ranks(), engine.cpu)
    module = parts.model.module
    module.load_state_dict(state)
    module.eval()
    sums = {}
    for layer in batch_norms(module):
        layer.train()
        layer.momentum = 1.0
    used = parts.schedule.statistics_batches(0, epoch=0, most=num)
    assert {len(batch) for batch in used} == {size}
    for batch in used:
        images = torch.stack([parts.train_set[0, index][0] for index in batch])
        module(parts.preprocessing.normalize(images))
        for name, value in statistics(module.state_dict()).items():
            sums[name] = sums.get(name, 0) + value.double() / len(used)
    return sums


@pytest.mark.parametrize("world_size", [1, 2])
def test_they_are_the_means_over_training_batches_of_the_weights_that_are_validated(
    make_run, engine, in_ranks, world_size
):
    run = make_run(**SLOW_STATISTICS)
    found = in_ranks(world_size, lambda who: engine.train(run, who))
    expected = by_hand(run, found[0].state, engine, num=6, size=6)
    for name, value in statistics(found[0].state).items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-4, atol=1e-5), name
    assert engine.identical(statistics(load(run.best_checkpoint).model), statistics(found[0].state))
    assert all(engine.identical(rank.state, found[0].state) for rank in found)
    (event,) = recomputed(run)
    assert (event["epoch"], event["batches"], event["batch_size"]) == (0, 6, 6)


def test_statistics_are_left_alone_after_steps_enough_to_forget_their_start(make_run, engine, one_rank):
    def quick(parts):  # 7 steps an epoch: 20 are enough in the third
        for layer in batch_norms(parts.model.module):
            layer.momentum = 0.5

    run = make_run(model={"arch": "shufflenet_v2_x0_5"}, batch={"size": 6}, train={"epochs": 4})
    engine.train(run, prepare=quick)
    assert [event["epoch"] for event in recomputed(run)] == [0, 1]


def test_it_is_told_and_so_is_validation_and_how_far_they_are(make_run, engine, one_rank, monkeypatch):
    told = []
    monkeypatch.setattr(phases.Line, "update", lambda self, detail: told.append((self.phase, detail)))
    with phases.told_by(phases.Line(io.StringIO())):
        engine.train(make_run(**SLOW_STATISTICS))
    assert told[:6] == [("computing BatchNorm's statistics, training batch", f"{n} of 6") for n in range(1, 7)]
    assert told[-1] == ("validating", "23 of 23")


@pytest.mark.parametrize(("wanted", "batches"), [(0, []), (2, [2]), (500, [6])])
def test_the_recipe_decides(make_run, engine, one_rank, wanted, batches):
    run = make_run(**SLOW_STATISTICS, train={"batchnorm_recompute": wanted})
    engine.train(run)
    assert [event["batches"] for event in recomputed(run)] == batches


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"arch": "squeezenet1_1"}},  # has no BatchNorm
        {"model": {"arch": "mobilenet_v3_small", "freeze": ["backbone"]}},
        {
            "model": {"arch": "mobilenet_v3_small"},
            "batch": {"size": 1, "accumulate": 8},
        },  # learns by no batch statistics
    ],
    ids=["none", "frozen", "lone images"],
)
def test_where_no_statistics_learn_there_is_nothing_to_compute(make_run, engine, one_rank, changes):
    run = make_run(**changes)
    found = engine.train(run)
    assert recomputed(run) == []
    assert engine.identical(statistics(found.state), statistics(found.initial))


@pytest.mark.slow
def test_those_of_a_head_that_only_training_has_stay_what_they_were(make_run, engine, one_rank):
    run = make_run(model={"arch": "googlenet"}, data={"image_size": 64}, batch={"size": 37})
    found = engine.train(run)
    assert [event["batches"] for event in recomputed(run)] == [1]
    spared = {n: v for n, v in statistics(found.state).items() if n.startswith("aux") and n.endswith("running_var")}
    assert spared
    assert all((value >= 0.9).all() for value in spared.values())  # the average after one step from 1


def test_frozen_layers_keep_theirs(make_run, engine, one_rank):
    run = make_run(model={"arch": "mobilenet_v3_small", "freeze": ["features.[0-3]"]})
    found = engine.train(run)
    before, after = statistics(found.initial), statistics(found.state)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.split(".")[1] in list("0123")}


@pytest.mark.slow
def test_a_run_stopped_while_they_are_computed_ends_with_the_same_bits(make_run, engine, in_ranks):
    changes = {**SLOW_STATISTICS, "data": {"augment": "standard"}, "train": {"epochs": 2}}
    undisturbed = make_run("whole", **changes)
    whole = in_ranks(2, lambda who: engine.train(undisturbed, who))[0]
    for poll in (5, 6, 8):  # 4 steps; 3 batches a rank are computed from, 2 validated
        run = make_run(f"stopped-{poll}", **changes)
        cut = in_ranks(2, lambda who, run=run, poll=poll: engine.train(run, who, stop=engine.at_poll(poll)))[0]
        assert (cut.outcome, cut.step) == ("preempted", 4)
        found = in_ranks(2, lambda who, run=run: engine.train(run, who))[0]
        assert engine.identical(found.state, whole.state)
        assert found.best == whole.best


@pytest.mark.slow
def test_a_net_of_slow_statistics_validates_as_well_as_it_trains(make_run, engine, one_rank, tmp_path):
    folder = engine.write_images(tmp_path / "images", train=140, val=70)
    best = {}
    for wanted in ("auto", 0):
        run = make_run(
            f"run-{wanted}",
            model={"arch": "mobilenet_v3_small"},
            data={"path": str(folder)},
            batch={"size": 8},
            optim={"name": "adamw", "lr": 2e-3, "schedule": "cosine"},
            train={
                "epochs": 6,
                "batchnorm_recompute": wanted,
                "early_stopping": {"metric": "val/top1", "mode": "max"},
            },
        )
        best[wanted] = engine.train(run).best
    assert best["auto"]["value"] >= 0.75, best
    assert best["auto"]["epoch"] > 0
    assert best[0]["value"] < 0.6, best
