"""A model of the user's own: where its head is, what it was trained with, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from launcher.engine.model import FineTunedModel, build_preprocessing
from launcher.engine.user import model as user_model
from launcher.errors import UsageError
from launcher.recipe.schema import ModelConfig
from launcher.recipe.schema_data import DataConfig

CONFIG = ModelConfig(factory="code/net.py:build")


def with_parts(**parts):
    """A module with these parts, each with 5 outputs where nothing else is said."""
    module = nn.Module()
    module.stem = nn.Conv2d(3, 8, 3)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


@pytest.mark.parametrize(
    ("parts", "head"),
    [
        ({"fc": nn.Linear(8, 5)}, "fc"),
        ({"classifier": nn.Sequential(nn.Dropout(), nn.Linear(8, 6), nn.Linear(6, 5))}, "classifier.2"),
        ({"head": nn.Sequential(nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1))}, "head.0"),
        ({"fc": nn.Identity(), "heads": nn.Linear(8, 5)}, "heads"),
        ({"out": nn.Sequential(nn.Linear(8, 5), nn.Softplus()), "other": nn.Linear(8, 4)}, "out.0"),
        ({"fc": nn.Sequential(nn.Linear(8, 40))}, "fc"),
        ({"odd": nn.BatchNorm1d(4)}, "odd"),
    ],
)
def test_the_head_is_the_layer_with_an_output_for_each_class(parts, head):
    assert user_model.head_of(with_parts(**parts), CONFIG, num_classes=5) == (head,)


def test_the_head_is_where_the_model_says_or_where_the_recipe_says(monkeypatch):
    module = with_parts(fc=nn.Linear(8, 5), last=nn.Linear(8, 5))
    module.pretrained_cfg = {"classifier": "last"}
    assert user_model.head_of(module, CONFIG, num_classes=5) == ("last",)
    named = ModelConfig(factory="code/net.py:build", head=["stem", "fc"])
    assert user_model.head_of(module, named, num_classes=5) == ("stem", "fc")


def test_sizes_and_colours_are_those_that_a_part_of_the_model_was_trained_with():
    inner = with_parts(fc=nn.Linear(8, 5))
    inner.default_cfg = {"input_size": (3, 288, 288), "mean": (0.5, 0.4, 0.3), "std": [0.2] * 3}
    inner.default_cfg["interpolation"] = "bicubic"
    found = user_model.facts_of(nn.Sequential(inner))
    assert found == user_model.InputFacts(
        image_size=288, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), interpolation="bicubic"
    )
    assert user_model.facts_of(nn.Linear(1, 1)) == user_model.InputFacts()


def test_what_the_recipe_says_of_the_input_counts_more():
    data = DataConfig(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation="bicubic", image_size=96)
    for model in (CONFIG, ModelConfig(arch="resnet18")):
        found = build_preprocessing(model, data)
        assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert (found.interpolation, found.image_size) == ("bicubic", 96)


def test_what_the_factory_has_frozen_stays_so_until_it_is_named():
    module = with_parts(fc=nn.Linear(8, 5))
    module.stem.requires_grad_(requires_grad=False)
    config = ModelConfig(factory="code/net.py:build", freeze=["fc"], unfreeze={1: "fc", 2: "stem"})
    model = FineTunedModel(module, config, ["fc"])
    frozen = [model.frozen_parameters(epoch) for epoch in range(3)]
    assert [len(names) for names in frozen] == [4, 2, 0]


def test_a_trial_changes_nothing_of_the_model():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
    module(torch.rand(2, 3, 16, 16))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    user_model.try_forward(module, CONFIG, num_classes=5, image_size=16)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("found", [torch.zeros(2, 5, 1), torch.zeros(2, 5, dtype=torch.int64), {"logits": 1}, None])
def test_what_is_no_table_of_logits_is_refused(found):
    with pytest.raises(UsageError, match="must return a float tensor of 2 x 5 logits"):
        user_model.check_logits(found, CONFIG, num=2, num_classes=5)
