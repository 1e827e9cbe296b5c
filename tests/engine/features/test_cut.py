from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional

from launcher.engine.features.cut import NoCutError, find, moving_layers
from launcher.engine.model import FineTunedModel, build_module
from launcher.recipe.schema import ModelConfig

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def cut(model, *, training=True):
    model.freeze(0)
    model.train()
    moving = moving_layers(model.module)
    if not training:
        model.eval()
    return find(model.module, moving, IMAGES, contextlib.nullcontext, channels_last=False)


def of(arch, freeze):
    config = ModelConfig(arch=arch, weights=None, freeze=freeze)
    return FineTunedModel(build_module(config, num_classes=5, image_size=32), config)


def own(module, *names):
    for name in names:
        module.get_submodule(name).requires_grad_(False)
    return FineTunedModel(module, ModelConfig(factory="net.py:Net"), ("fc",))


@pytest.mark.parametrize(
    ("arch", "freeze", "num_features"),
    [
        ("mobilenet_v3_small", ["backbone"], 1024),  # of its classifier's second Linear; the first is not the head
        ("shufflenet_v2_x0_5", ["backbone"], 1024),
        ("resnet18", ["conv1", "bn1", "layer1"], 64 * 8 * 8),
        ("squeezenet1_1", ["features.[0-5]"], 128 * 3 * 3),
        ("mobilenet_v2", ["features.[0-9]"], 64 * 2 * 2),
    ],
)
def test_torchvisions_are_cut_as_late_as_can_be(arch, freeze, num_features):
    assert cut(of(arch, freeze)).num_features == num_features


def test_in_evaluation_dropout_comes_before_the_cut_and_layers_that_learn_do_not():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(), nn.Linear(3600, 5), nn.ReLU())
    model = own(module, "0")
    training, evaluation = cut(model), cut(model, training=False)
    names = [[node.name for node in one.rest.graph.graph.nodes] for one in (training, evaluation)]
    assert names == [["_1", "_2", "_3", "_4", "output"], ["_2", "_3", "_4", "output"]]


class Net(nn.Module):
    """A stem, and a head that learns."""

    def __init__(self, between):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3, stride=8), nn.Linear(64, 5)
        self.between = between

    def forward(self, images, scale=2.0):
        return self.fc(self.between(self.stem(images).flatten(1)) * scale)


def test_arguments_with_defaults_keep_them():
    found = cut(own(Net(lambda x: x), "stem"))
    assert found.num_features == 64


@pytest.mark.parametrize("between", [functional.dropout, lambda x: functional.dropout(x, 0.5, True)])
def test_a_random_function_is_in_the_rest(between):
    found = cut(own(Net(between), "stem"))
    assert "dropout" in [node.name for node in found.rest.graph.graph.nodes]
    assert found.rest_trains
    assert not cut(own(Net(nn.Dropout()), "stem")).rest_trains


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda x: x * torch.rand(()), "something else"),  # drawn while it is traced, and never again
        (lambda x: torch.bernoulli(x.sigmoid()), "something else"),
        (lambda x: x - x.mean(0), "something else"),  # depends on what else is in the batch
        (lambda x: x if x.sum() > 0 else -x, "cannot be traced"),
    ],
)
def test_where_features_would_be_wrong_there_is_no_cut(between, why):
    with pytest.raises(NoCutError, match=why):
        cut(own(Net(between), "stem"))


def test_a_network_whose_first_layer_learns_has_no_cut():
    model = of("resnet18", ["layer4"])
    with pytest.raises(NoCutError, match="take the images themselves"):
        cut(model)


def test_running_statistics_stay_as_they_were():
    model = of("shufflenet_v2_x0_5", ["conv1"])
    before = {name: buffer.clone() for name, buffer in model.module.named_buffers()}
    cut(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.module.named_buffers())
    assert any("running_mean" in name for name in before)
