"""The same validation images through the epochs, with the model's answers, on any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launcher.engine.augmenting import picture
from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.device import Device
from launcher.engine.loading.data_sets import open_data_sets
from launcher.engine.model import build_module
from launcher.engine.network.fitting import load_state
from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer
from launcher.engine.validating.examples import NUM_IMAGES, Examples, choose
from launcher.engine.validating.several import Picked
from launcher.recipe import load as recipes


class Labelled(SimpleNamespace):
    def key(self, index):
        return self.samples[index][0]

    def __len__(self):
        return len(self.samples)


def labelled(labels):
    return Labelled(samples=[(str(place), label) for place, label in enumerate(labels)])


def test_each_class_has_its_turn_and_the_choice_stays_the_same():
    images = labelled([0] * 500 + [1] * 3 + [2])
    chosen = choose(images, seed=7)
    assert chosen == choose(images, seed=7) != choose(images, seed=8)
    assert len(set(chosen)) == NUM_IMAGES
    labels = [images.samples[index][1] for index in chosen]
    assert sorted(labels[:3]) == [0, 1, 2]
    assert sorted(labels[3:5]) == [0, 1]
    assert labels[7:] == [0] * 9
    assert choose(labelled([(0, 1), ()]), seed=7) in ([0, 1], [1, 0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_shows_the_same_images_after_each_epoch(make_run, engine, in_ranks, world_size):
    run = make_run(f"run-{world_size}", train={"epochs": 2}, batch={"size": 6})

    def train(ranks):
        torch.set_num_threads(1)
        records = engine.records(run) if ranks.rank == 0 else None
        Trainer(build_parts(run, ranks, engine.cpu), recorder=records, stop_requested=engine.never).run()
        return [line for line in records.lines if line["split"] == "val"] if records else None

    lines = in_ranks(world_size, train)[0]
    shown = [[row["image"] for row in line["examples"]] for line in lines]
    assert shown[0] == shown[1]
    assert len(set(shown[0])) == NUM_IMAGES
    for line in lines:
        assert len({row["true"] for row in line["examples"][:7]}) == 7  # one of each class first
        for row in line["examples"]:
            assert Path(row["image"]).parent.name == row["true"]
            assert 1 / 7 < row["confidence"] <= 1
        said = [row["predicted"] for row in line["examples"]]
        assert {name for name in said if said.count(name) > column(line, name)} == set()
    check_answers(run, lines[-1])
    batch = json.loads(run.sample_batch.read_text())
    assert (batch["epoch"], batch["mixed"]) == (0, None)
    images = open_data_sets(run).train
    first = picture.first(images, recipes.read_resolved(run.recipe), epoch=0, num=12)
    assert [row["image"] for row in batch["images"]] == [images.key(index) for index in first]
    assert all(row["picture"].startswith("data:image/jpeg") for row in batch["images"])


def check_answers(run, line):
    """They are those of the model that the checkpoint after it has."""
    saved, recipe = checkpoints.load(run.last_checkpoint), recipes.read_resolved(run.recipe)
    assert saved.step == line["step"]
    sets = open_data_sets(run)
    module = build_module(recipe.model, num_classes=7, image_size=sets.preprocessing.image_size, channels=3).eval()
    load_state(module, saved.model)
    keys = [sets.val.key(index) for index in range(len(sets.val))]
    chosen = [keys.index(row["image"]) for row in line["examples"]]
    with torch.no_grad():
        images = torch.stack([sets.val[0, index][0] for index in chosen])
        sure, said = module(sets.preprocessing.normalize(images)).softmax(dim=1).max(dim=1)
    assert [row["predicted"] for row in line["examples"]] == [sets.val.classes[place] for place in said.tolist()]
    assert [row["confidence"] for row in line["examples"]] == pytest.approx(sure.tolist(), abs=1e-5)


@pytest.mark.usefixtures("one_rank")
def test_a_confidence_that_is_no_number_is_null():
    parts = SimpleNamespace(
        val_set=labelled([0, 1]),
        classes=("a", "b"),
        recipe=SimpleNamespace(seed=0),
        ranks=SimpleNamespace(rank=0),
        device=Device(type="cpu"),
        schedule=SimpleNamespace(batching=SimpleNamespace(shares=(1,))),
    )
    given = SimpleNamespace(several=None, confidences=torch.tensor([math.nan, 0.5]), pairs=torch.tensor([0, 2]))
    rows = sorted(Examples(parts).rows(given), key=lambda row: row["image"])
    assert [(row["predicted"], row["confidence"]) for row in rows] == [("a", None), ("a", 0.5)]


def column(line, name):
    """How often a validation answered a class."""
    place = list(line["per_class"]).index(name)
    return sum(row[place] for row in line["confusion"])


def test_of_several_classes_the_answers_of_some_places_are_kept():
    picked = Picked([1, 3])
    picked.add(torch.tensor([[0.9, 0.2], [0.6, 0.1]]), torch.tensor([[True, False], [True, False]]))
    picked.add(torch.tensor([[0.9, 0.2], [0.3, 0.2]]), torch.tensor([[True, False], [False, False]]))
    assert {place: [round(value, 3) for value in row.tolist()] for place, row in picked.rows.items()} == {
        1: [0.6, 1, 0],
        3: [0.7, 0, 0],
    }
