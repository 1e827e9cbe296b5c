"""What a recipe changes in an architecture: its head, dropout, stochastic depth."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from launcher.engine import recipe_checks
from launcher.engine.layers import build_meta, head_modules
from launcher.engine.model import build_model, head_of
from launcher.engine.network.shape import Dropout, problems
from launcher.errors import RecipeError
from launcher.recipe import load as recipes
from launcher.recipe.schema import ModelConfig

FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "swin_v2_t"),
    *("squeezenet1_1", "vgg11", "vit_b_32"),
)


def made(image_size=32, **model):
    recipe = recipes.from_dict({"model": {"weights": None, **model}})
    return build_model(recipe, num_classes=5, image_size=image_size, with_weights=False)


def on_meta(arch, **model):
    """The architecture changed, and what could not be."""
    module = build_meta(arch, 5)
    return module, dict(problems(module, ModelConfig(arch=arch, **model), head_modules(arch)))


HEADS = {
    "resnet18": "fc",
    "mobilenet_v3_small": "classifier.3",
    "squeezenet1_1": "classifier.1",  # a convolution
}


@pytest.mark.parametrize("kind", ["mlp(6)", "dropout(0.3)"])
@pytest.mark.parametrize("arch", HEADS)
def test_another_head_gives_logits_is_the_head_and_learns_alone_if_the_rest_is_frozen(arch, kind):
    model = made(arch=arch, head=kind, freeze=["backbone"])
    assert model.module.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    model.freeze(0)
    learning = [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    assert learning
    assert all(name.startswith(HEADS[arch]) for name in learning)
    assert len(learning) == (4 if kind.startswith("mlp") else 2)


def test_a_hidden_layer_is_as_wide_as_it_says_and_a_dropout_as_strong():
    hidden = made(arch="resnet18", head="mlp(6)").module.fc
    assert [tuple(p.shape) for p in hidden.parameters()] == [(6, 512), (6,), (5, 6), (5,)]
    assert made(arch="resnet18", head="dropout(.25)").module.fc[0].p == 0.25
    own = made(arch="mobilenet_v2", head="dropout(0.5)").module.classifier  # it has one there: there are not two then
    assert [type(layer) for layer in own] == [nn.Dropout, nn.Linear]
    assert own[0].p == 0.5


def test_linear_is_what_most_architectures_have_and_what_has_another_is_refused():
    assert isinstance(made(arch="resnet18", head="linear").module.fc, nn.Linear)
    _, refused = on_meta("squeezenet1_1", head="linear")
    assert refused == {
        "model.head": "found linear, but the last layer of squeezenet1_1, classifier.1, is a Conv2d; give auto"
    }


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_architecture_takes_each_key_or_says_that_it_cannot(arch):
    module, refused = on_meta(arch, dropout=0.31, stochastic_depth=0.42, head="mlp(4)")
    assert "model.head" not in refused
    rates = {layer.p for layer in module.modules() if isinstance(layer, Dropout)}
    rates |= {layer.drop_rate for layer in module.modules() if hasattr(layer, "drop_rate")}
    assert rates == (set() if "model.dropout" in refused else {0.31})
    depths = [layer.p for layer in module.modules() if isinstance(layer, StochasticDepth)]
    assert max(depths, default=None) == (None if "model.stochastic_depth" in refused else pytest.approx(0.42))


@pytest.mark.parametrize(("arch", "argument"), [("convnext_tiny", "stochastic_depth_prob"), ("swin_t", None)])
def test_stochastic_depth_grows_with_depth_as_where_the_architecture_is_built_with_it(arch, argument):
    found = [
        layer.p for layer in on_meta(arch, stochastic_depth=0.5)[0].modules() if isinstance(layer, StochasticDepth)
    ]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(0.5)
    if argument:
        built = models.get_model(arch, **{argument: 0.5}).modules()
        assert found == pytest.approx([layer.p for layer in built if isinstance(layer, StochasticDepth)])


NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.drop, self.fc = nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Linear(4, num_classes)

    def forward(self, images):
        return self.fc(self.drop(self.stem(images).mean((2, 3))))
"""


def test_so_does_a_model_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"factory": "own_net:Net", "dropout": 0.1, "freeze": ["backbone"]}
    model = made(**own, head="mlp(7)")
    assert model.module.drop.p == 0.1
    assert model.head == ("fc",)
    assert model.frozen_parameters(0) == {"stem.weight", "stem.bias"}
    config = ModelConfig(**own, head="dropout(0.2)")
    assert head_of(made(**own, head="dropout(0.2)").module, config, num_classes=5) == ("fc.1",)


def test_all_that_an_architecture_lacks_is_told_at_once_before_anything_starts(images):
    values = {"arch": "resnet18", "weights": None, "dropout": 0.2, "stochastic_depth": 0.1}
    recipe = recipes.from_dict({"model": values, "data": {"path": str(images), "image_size": 32}})
    with pytest.raises(RecipeError) as caught:
        recipe_checks.check(recipe, str)
    found = {problem.key: problem.message for problem in caught.value.problems}
    assert found.keys() == {"model.dropout", "model.stochastic_depth"}
    assert "resnet18 has no dropout; leave it out, or give model.head: dropout(0.2)" in found["model.dropout"]


@pytest.mark.parametrize("head", ["mlp", "mlp(0)", "mlp(-3)", "dropout(1.5)", "conv", "dropout(0.2"])
def test_a_head_of_another_form_is_refused_with_the_forms_there_are(recipe_file, images, head):
    file = recipe_file(f"model: {{weights: null, head: '{head}'}}\ndata: {{path: {images}}}\n")
    with pytest.raises(RecipeError, match=r"model\.head: found .*auto, linear, mlp\(256\), dropout\(0\.2\)"):
        recipes.load(str(file))
