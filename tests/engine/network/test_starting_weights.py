"""Weights that do not fit: whose they are; weights that do: what is not as in the file."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models

from launcher.engine.layers import build_meta, head_modules
from launcher.engine.network import starting_weights
from launcher.recipe import load as recipes
from tests.engine.network.test_timm_names import as_timm


@pytest.fixture
def problems(tmp_path):
    """What is said of a state dict as the weights of an architecture."""

    def find(state, arch, size=224):
        torch.save(state, tmp_path / "w.pth")
        recipe = recipes.from_dict({"model": {"arch": arch, "weights": str(tmp_path / "w.pth")}})
        options = {"is_new": True, "head": head_modules(arch), "classes": list("abc")}
        found = starting_weights.find_problems(recipe, build_meta(arch, 3), size, **options)
        return [text.partition("w.pth ")[2] for _, text in found]

    return find


def test_weights_of_another_architecture_are_told_by_its_name(problems):
    state = {f"module.{name}": value for name, value in models.resnet18(num_classes=5).state_dict().items()}
    assert problems({"epoch": 3, "model": state}, "resnet34") == [
        "does not fit resnet34: it has the weights of resnet18; give model.arch=resnet18, or another file"
    ]


def test_so_are_timms(problems):
    state = dict(as_timm(models.vit_b_32(num_classes=7, image_size=64).state_dict()))
    assert problems(state, "vit_b_16") == [
        "does not fit vit_b_16: it has the weights of vit_b_32; give model.arch=vit_b_32, or another file"
    ]
    (text,) = problems({**state, "blocks.3.ls1.gamma": torch.ones(768)}, "vit_b_32")
    assert text == (
        "does not fit vit_b_32: 1 keys unknown: blocks.3.ls1.gamma; its names are timm's, of a variant that "
        "torchvision has not"
    )


def test_names_that_nothing_has_are_not_listed_twice(problems):
    (text,) = problems(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 3)).state_dict(), "maxvit_t")
    assert text.startswith("does not fit maxvit_t: none of its 4 names (0.weight, …) is one of that model's; known are")


def test_what_is_read_in_another_way_is_told(problems, capsys):
    state = dict(as_timm(models.vit_b_32(num_classes=7, image_size=64).state_dict()))
    assert problems(state, "vit_b_32", size=96) == []
    shown = capsys.readouterr().out
    assert (
        "timm's names are read as torchvision's; many of timm's were trained with data.mean and data.std of 0.5"
        in shown
    )
    assert "position embeddings are interpolated from 2 x 2 patches of an image to 3 x 3\n" in shown
    assert problems(state, "vit_b_32", size=64) == []
    assert "interpolated" not in capsys.readouterr().out


def test_position_embeddings_of_a_users_own_model_are_its_own_affair(tmp_path, capsys):
    net = nn.ModuleDict({"encoder": nn.ParameterDict({"pos_embedding": torch.zeros(1, 16, 4)}), "fc": nn.Linear(4, 3)})
    torch.save(net.state_dict(), tmp_path / "w.pth")
    recipe = recipes.from_dict({"model": {"factory": "my:net", "weights": str(tmp_path / "w.pth")}})
    options = {"is_new": True, "head": ("fc",), "classes": list("abc")}
    assert list(starting_weights.find_problems(recipe, net, 96, **options)) == []
    assert "interpolated" not in capsys.readouterr().out
