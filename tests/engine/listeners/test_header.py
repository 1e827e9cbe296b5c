"""What a run says before its first step."""

from __future__ import annotations

import pytest
import torchvision

from launcher.engine.distributed import Ranks
from launcher.engine.listeners import header
from launcher.engine.setup import build_parts


@pytest.fixture
def lines(make_run, engine, one_rank):
    return lambda **changes: "\n".join(header.lines(build_parts(make_run(**changes), Ranks(), engine.cpu)))


def test_it_says_what_is_trained_by_what_on_what(lines):
    found = lines(batch={"size": 4, "accumulate": 2}, train={"epochs": 2}, optim={"lr": 0.02, "schedule": "linear"})
    assert "random weights" in found
    assert "all learn" in found
    assert "validation images; the model sees" in found
    assert "of 8 images each, 4 at once on 1 rank; " in found
    assert "2 epochs" in found
    assert "rate 0.02, linear schedule; fp32 on cpu" in found


def test_images_with_several_classes_or_none_count_once(make_run, engine, one_rank):
    several = {"task": "multi_label", "dataset": "tests.several_labels:Photos"}
    parts = build_parts(make_run(data=several, train={"loss": "binary_cross_entropy"}), Ranks(), engine.cpu)
    facts = header.facts(parts)
    assert facts["train_images"] == 37
    assert facts["torchvision"] == torchvision.__version__
    assert facts["commit"] == parts.run.read_launched().commit
    assert "37 training images in 8 classes: " in "\n".join(header.lines(parts))


def test_what_is_frozen_does_not_learn(lines):
    found = lines(model={"freeze": ["backbone"], "unfreeze": {1: "backbone"}}, train={"epochs": 2})
    assert "of them learn in the first of 2 phases (epochs 1 to 1)" in found
    total, learn = (
        int(text.split()[-1].replace(",", ""))
        for text in found.partition("\n")[0].split(" of them")[0].split(" parameters, ")
    )
    assert 0 < learn < total


def test_the_rate_is_the_one_at_this_global_batch(lines):
    assert "rate 0.02," in lines(batch={"size": 8}, optim={"lr": 0.01, "lr_batch_size": 4})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim": {"lr": 0.5, "groups": {"head": 0.01, "*": 0.001}}}, "sgd, rates 0.01 (head), 0.001 (*), constant"),
        ({"optim": {"groups": {"head": 0.02, "*": 0.02}}}, "sgd, rate 0.02, constant"),
        ({"optim": {"lr": 0.1, "layer_decay": 0.5}}, "sgd, rates 0.1 (rest-0) to 1.22e-05 (rest-13), constant"),
        ({"optim": {"groups": {"head": 0.02}}, "model": {"freeze": ["backbone"]}}, "sgd, rate 0.02, constant"),
    ],
)
def test_rates_are_those_of_what_learns(lines, changes, said):
    assert said in lines(**changes)


@pytest.mark.parametrize(
    ("patience", "said"), [(3, "; stops 3 epochs after the last better one"), (None, "best by val/f1")]
)
def test_it_says_what_is_best_and_when_training_stops(lines, patience, said):
    found = lines(train={"early_stopping": {"metric": "val/f1", "patience": patience}})
    assert said in found
    assert ("stops" in found) == (patience is not None)


def test_with_phases_it_is_the_first_ones_rate(lines):
    phases = [{"epochs": 2, "freeze": ["backbone"], "optim": {"lr": 0.05, "schedule": "constant"}}, {"epochs": 1}]
    found = lines(train={"epochs": 3, "phases": phases}, optim={"lr": 0.001})
    assert "rate 0.05, constant schedule" in found
    assert "in the first of 2 phases (epochs 1 to 2)" in found
