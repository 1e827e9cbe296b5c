"""Training from the kept features of a frozen backbone is training from its images."""

from __future__ import annotations

import itertools
import os
import resource
import signal
from dataclasses import replace

import pytest

from launcher.engine.augmenting.sample_batch import FirstBatch
from launcher.engine.distributed import Ranks
from launcher.engine.features import choice, table
from launcher.engine.layers import build_meta
from launcher.engine.loading.samples import Samples
from launcher.engine.model import FineTunedModel
from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer
from launcher.recipe import load as recipes
from launcher.system.files import read_jsonl
from tests.nets import NET

HEAD_ONLY = {
    "model": {"arch": "squeezenet1_1", "freeze": ["backbone"]},  # with dropout behind the cut
    "train": {"epochs": 3},
}


def events(run, kind):
    return [event for event in read_jsonl(run.events) if event["kind"] == kind]


def with_and_without(make_run, learn, **changes):
    """The same recipe trained from features and from images."""
    recipe = {key: {**HEAD_ONLY.get(key, {}), **changes.get(key, {})} for key in {*HEAD_ONLY, *changes}}
    images = {**recipe, "train": {**recipe["train"], "feature_views": 0}}
    kept, plain = make_run("kept", **recipe), make_run("plain", **images)
    return (kept, learn(kept)), (plain, learn(plain))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_weights_are_those_of_training_from_images(make_run, engine, in_ranks, world_size):
    batch = {"size": 9 // world_size, "accumulate": 2}

    def train(run):
        return in_ranks(world_size, lambda who: engine.train(run, who))[0]

    (kept, found), (plain, expected) = with_and_without(make_run, train, batch=batch)
    assert engine.largest_difference(found.state, expected.state) < 1e-6
    assert engine.largest_difference(found.state, found.initial) > 1e-4
    for one, other in zip(found.lines, expected.lines, strict=True):
        assert one.keys() == other.keys()
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one.get("confusion") == other.get("confusion")
    told = [(event["split"], event["images"], event["views"]) for event in events(kept, "features_kept")]
    assert told == [("train", 37, 1), ("val", 23, 1)]
    assert events(plain, "features_kept") == []


@pytest.fixture
def loaded(monkeypatch):
    """The (epoch, index) of all images that this process has read from here on, but to show people the first ones."""
    monkeypatch.setattr(FirstBatch, "write", lambda self, say: None)
    seen, read = [], Samples.__getitem__
    monkeypatch.setattr(Samples, "__getitem__", lambda self, at: seen.append((len(self), *at)) or read(self, at))
    return seen


@pytest.mark.parametrize("views", [1, 2])
def test_each_view_of_an_image_is_read_once_and_seen_again_in_later_epochs(make_run, engine, one_rank, loaded, views):
    kinds = {"data": {"augment": "standard"}, "batch": {"size": 37}}
    run = make_run(**HEAD_ONLY | {"train": {"epochs": 4, "feature_views": views}}, **kinds)
    found = engine.train(run)
    looked_at = [(37, 0, index) for index in range(4)] * 2
    expected = [(37, view, index) for view in range(views) for index in range(37)]
    assert sorted(loaded) == sorted(looked_at + expected + [(23, 0, index) for index in range(23)])
    plain = engine.train(make_run("plain", **HEAD_ONLY | {"train": {"epochs": 4, "feature_views": 0}}, **kinds))
    train = [[line["loss"] for line in one.lines if line["split"] == "train"] for one in (found, plain)]
    same = [one == pytest.approx(other, rel=1e-5) for one, other in zip(*train, strict=True)]
    assert same == [epoch < views for epoch in range(4)]  # epoch e takes view e, and then the first again


def test_with_random_transforms_only_validation_is_kept_and_the_views_are_named(make_run, engine, one_rank, capsys):
    run = make_run(**HEAD_ONLY, data={"augment": "light"}, batch={"size": 37})
    said = []
    parts = build_parts(run, Ranks(), engine.cpu)
    records = engine.records(run)
    records.say = said.append
    Trainer(parts, recorder=records, stop_requested=engine.never).run()
    assert [event["split"] for event in events(run, "features_kept")] == ["val"]
    (hint,) = [line for line in said if "train.feature_views" in line]
    assert "data.augment=light" in hint


@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({}, 1),
        ({"data": {"augment": "light"}}, 0),
        ({"data": {"augment": "light"}, "train": {"feature_views": 3}}, 3),
        ({"data": {"flip": 0.5}}, 0),
        ({"data": {"mixup": 0.2}}, 0),
        ({"data": {"transform": "own.py:Transform"}}, 0),
        ({"train": {"feature_views": 0}}, 0),
    ],
)
def test_how_many_views_are_kept(changes, views):
    recipe = recipes.from_dict({**changes, "data": {"augment": "none", **changes.get("data", {})}})
    assert choice.num_views(recipe) == views


@pytest.mark.parametrize(
    ("freeze", "unfreeze", "epochs"),
    [([], {}, 0), (["backbone"], {}, 9), (["backbone"], {3: "layer4", 5: "*"}, 3), (["layer1"], {2: "layer4"}, 9)],
)
def test_how_many_epochs_the_same_layers_are_frozen(freeze, unfreeze, epochs):
    model = {"arch": "resnet18", "weights": None, "freeze": freeze, "unfreeze": unfreeze}
    recipe = recipes.from_dict({"model": model, "train": {"epochs": 9}})
    assert choice.frozen_epochs(recipe, FineTunedModel(build_meta("resnet18", 5), recipe.model)) == epochs


STOPPED = {
    "data": {"augment": "standard"},
    "batch": {"size": 4, "accumulate": 2},
    "train": {"epochs": 3, "feature_views": 2, "checkpoint": {"every_steps": 1}},
}


@pytest.mark.slow
def test_a_run_that_is_stopped_anywhere_comes_to_the_same_bits(make_run, engine, one_rank):
    expected = engine.train(make_run("undisturbed", **HEAD_ONLY | STOPPED))
    run = make_run(**HEAD_ONLY | STOPPED)
    for poll in itertools.chain([3], itertools.count(11)):  # in the first filling, then ever later
        found = engine.train(run, stop=engine.at_poll(poll))
        if found.outcome == "completed":
            break
    assert poll > 12
    assert engine.identical([found.state, found.optimizer], [expected.state, expected.optimizer])


@pytest.mark.slow
def test_so_does_one_whose_worker_was_killed(make_run, engine, in_ranks):
    expected = in_ranks(2, lambda who: engine.train(make_run(f"of-{who.rank}", **HEAD_ONLY | STOPPED), who))

    def die(ranks, run):
        count = itertools.count()
        kill = lambda: next(count) > 25 and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        return engine.train(run, ranks, stop=kill if ranks.rank else engine.never)

    run = make_run(**HEAD_ONLY | STOPPED)
    before = set(os.listdir("/dev/shm"))  # noqa: PTH208, S108
    in_ranks(2, lambda who: die(who, run), failing=True)
    assert set(os.listdir("/dev/shm")) == before  # noqa: PTH208, S108
    assert saved_steps(run)
    found = in_ranks(2, lambda who: engine.train(run, who))
    assert engine.identical(found[0].state, expected[0].state)


def saved_steps(run):
    return [event["step"] for event in events(run, "checkpoint")]


@pytest.mark.slow
def test_the_features_are_given_up_where_layers_are_unfrozen(make_run, engine, in_ranks):
    model = {"arch": "shufflenet_v2_x0_5", "freeze": ["backbone"], "unfreeze": {2: "conv5"}}
    changes = {"model": model, "batch": {"size": 9}, "train": {"epochs": 3}}

    def train(run, **options):
        return in_ranks(2, lambda who: engine.train(run, who, **options))[0]

    (kept, found), (_, expected) = with_and_without(make_run, train, **changes)
    assert engine.largest_difference(found.state, expected.state) < 1e-6
    assert any(not engine.identical(found.state[n], found.initial[n]) for n in found.state if n.startswith("conv5"))
    assert len(events(kept, "features_kept")) == 2
    again = make_run("again", **changes)
    for poll in (11, 22, 10**6):
        last = train(again, stop=engine.at_poll(poll))
    assert engine.identical(last.state, found.state)


BEHIND = {
    "model": NET | {"freeze": ["features.0", "features.1"]},
    "batch": {"size": 9},
    "train": {"epochs": 2},
}


def test_batchnorm_behind_frozen_layers_is_computed_anew_from_the_features(make_run, engine, one_rank, loaded):
    (run, found), (plain, expected) = with_and_without(make_run, engine.train, **BEHIND)
    assert len(events(run, "batchnorm_recomputed")) == len(events(plain, "batchnorm_recomputed")) == 2
    assert engine.largest_difference(found.state, expected.state) < 1e-4
    of_kept = loaded[: len(loaded) - 2 * (37 + 36 + 23)]  # from images each epoch reads all, and most of them again
    assert len([at for at in of_kept if at[0] == 37]) == 2 * 4 + 37


@pytest.mark.slow
def test_stopped_while_it_is_computed_a_run_comes_to_the_same_bits(make_run, engine, one_rank):
    changes = BEHIND | {"train": {"epochs": 2, "checkpoint": {"every_steps": 1}}}
    expected = engine.train(make_run("undisturbed", **changes))
    epochs = set()
    for poll in range(8, 16):  # 5 steps, 4 batches to compute from, 3 of validation
        run = make_run(f"stopped-{poll}", **changes)
        epochs.add(engine.train(run, stop=engine.at_poll(poll)).step)
        found = engine.train(run)
        assert engine.identical([found.state, found.optimizer], [expected.state, expected.optimizer])
    assert 5 in epochs


@pytest.mark.slow
def test_layers_that_are_frozen_in_part_and_batchnorm_behind_them(make_run, engine, one_rank):
    model = {"arch": "shufflenet_v2_x0_5", "freeze": ["conv1", "stage2"]}
    only = {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0}
    train = {"epochs": 2}  # of one step each: BatchNorm of a new network makes more and more of a rounding
    (_, found), (_, expected) = with_and_without(
        make_run, engine.train, model=model, batch={"size": 37}, optim=only, train=train
    )
    assert engine.largest_difference(found.state, expected.state) < 1e-5


def test_each_of_several_nodes_has_all_features_whoever_computed_them(make_run, engine, in_ranks):
    run, alone = make_run(**HEAD_ONLY, batch={"size": 9}), make_run("alone", **HEAD_ONLY, batch={"size": 9})

    def train(ranks, run, nodes):
        who = replace(ranks, local_rank=0, local_world_size=1, node_rank=ranks.rank) if nodes else ranks
        excluded = frozenset({3, 5})

        def prepare(parts):
            parts.schedule = replace(parts.schedule, excluded=excluded)

        return engine.train(run, who, prepare=prepare)

    apart = in_ranks(2, lambda who: train(who, run, nodes=True))
    together = in_ranks(2, lambda who: train(who, alone, nodes=False))
    assert engine.identical(apart[0].state, together[0].state)
    assert [event["images"] for event in events(run, "features_kept")] == [35, 23]


@pytest.mark.parametrize("limit", ["disk", "both"])
def test_where_memory_is_short_they_are_on_disk_and_where_that_is_full_the_run_goes_on(
    make_run, engine, in_ranks, monkeypatch, limit
):
    run = make_run(**HEAD_ONLY, batch={"size": 18})
    monkeypatch.setattr(table, "MEMORY_PART", 0.0)
    monkeypatch.setattr(table, "_is_in_memory", lambda _: False)

    reserve = os.posix_fallocate

    def with_limit(*arguments):
        """As on a full disk: the kernel refuses."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))
        try:
            reserve(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    if limit == "both":
        monkeypatch.setattr(os, "posix_fallocate", with_limit)

    def train(ranks):
        return engine.train(run, ranks)

    found = in_ranks(2, train)[0]
    assert found.outcome == "completed"
    kept, refused = events(run, "features_kept"), events(run, "features_not_kept")
    assert [event["place"] == "memory" for event in kept] == ([False] * 2 if limit == "disk" else [])
    assert [event["message"].partition(": ")[2] for event in refused] == ["File too large"] * (2 * (limit == "both"))


LOOPS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

    def forward(self, images):
        found = self.stem(images).mean((2, 3))
        if found.sum() > 0:
            found = found * 2
        return self.fc(found)
"""


def test_a_network_that_cannot_be_cut_trains_from_images_and_the_reason_is_told(
    make_run, engine, one_rank, tmp_path, monkeypatch
):
    (tmp_path / "loops_net.py").write_text(LOOPS)
    monkeypatch.syspath_prepend(tmp_path)
    model = {"factory": "loops_net:Net", "freeze": ["stem"]}
    run = make_run(model=model, batch={"size": 37}, train={"epochs": 2})
    assert engine.train(run).outcome == "completed"
    (told,) = events(run, "features_not_kept")
    assert "cannot be traced" in told["message"]
