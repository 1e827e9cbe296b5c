"""Training from the kept features of a frozen backbone is training from its images."""

from __future__ import annotations

import pytest
import torch

from launcher.engine.distributed import Ranks
from launcher.system.files import read_jsonl

HEAD_ONLY = {
    "model": {"arch": "mobilenet_v3_small", "freeze": ["backbone"]},  # BatchNorm, and dropout behind the cut
    "train": {"epochs": 3},
}


def events(run, kind):
    return [event for event in read_jsonl(run.events) if event["kind"] == kind]


def never_compute(*_):
    raise AssertionError("an image was read where its features are kept")


def with_and_without(make_run, train, **changes):
    """The same recipe trained from features and from images."""
    recipe = {key: {**HEAD_ONLY.get(key, {}), **changes.get(key, {})} for key in {*HEAD_ONLY, *changes}}
    images = {**recipe, "train": {**recipe["train"], "feature_views": 0}}
    kept, plain = make_run("kept", **recipe), make_run("plain", **images)
    return (kept, train(kept)), (plain, train(plain))


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
