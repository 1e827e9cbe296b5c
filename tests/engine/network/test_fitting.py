"""Weights that are made to fit: of grey images, and of a run of one's own."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torchvision import models

from launcher import cli
from launcher.engine import recipe_checks
from launcher.engine.model import build_module
from launcher.engine.network.fitting import fit_weights, load_weights, take_grey
from launcher.errors import RecipeError, UsageError
from launcher.recipe import load as recipes
from launcher.recipe.paths import absolute
from launcher.recipe.schema import ModelConfig

ARCH = "shufflenet_v2_x0_5"
SMALL = {"arch": ARCH, "weights": None}


def grey(arch):
    """An architecture whose first convolution takes one channel."""
    net = models.get_model(arch, weights=None, num_classes=5)
    name, first = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(1, first.out_channels, first.kernel_size, first.stride, first.padding, bias=first.bias is not None)
    parent, _, own = name.rpartition(".")
    setattr(net.get_submodule(parent), own, new)
    return net.eval()


@pytest.mark.parametrize("arch", ["resnet18", "swin_t", "googlenet"])
@torch.no_grad()
def test_an_architecture_takes_one_channel_as_three_equal_ones(arch):
    config = ModelConfig(arch=arch, weights=None)
    torch.manual_seed(0)
    colour = build_module(config, num_classes=5, image_size=64).eval()
    torch.manual_seed(0)
    one = build_module(config, num_classes=5, image_size=64, channels=1).eval()
    images = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(one(images), colour(images.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)
    with pytest.raises(UsageError, match="has no three channels to add up"):
        take_grey(nn.Sequential(nn.Conv2d(4, 8, 3)), config)
    with pytest.raises(UsageError, match="it has none"):
        take_grey(nn.Linear(4, 8), config)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "vit_b_32"])
@torch.no_grad()
def test_a_grey_image_gives_what_it_gave_in_three_equal_colours(arch, tmp_path):
    torch.manual_seed(0)
    colour, one = models.get_model(arch, weights=None, num_classes=5).eval(), grey(arch)
    torch.save(colour.state_dict(), tmp_path / "w.pth")
    load_weights(one, ModelConfig(arch=arch, weights=str(tmp_path / "w.pth")), image_size=224)
    images = torch.rand(2, 1, 224, 224)
    torch.testing.assert_close(one(images), colour(images.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


def test_any_other_number_of_channels_does_not_fit():
    net = models.get_model(ARCH, weights=None, num_classes=5)
    state = net.state_dict()
    state["conv1.0.weight"] = torch.ones(24, 4, 3, 3)
    with pytest.raises(UsageError, match=r"1 of another shape: conv1\.0\.weight \(24x4x3x3, needs 24x3x3x3\)"):
        fit_weights(state, net, ModelConfig(arch=ARCH, weights="w.pth"), image_size=32)


@pytest.fixture
def trained(make_run, engine, one_rank):
    """A run with a best checkpoint of seven classes."""
    run = make_run("first", model=SMALL, batch={"size": 37}, train={"epochs": 1, "batchnorm_recompute": 0})
    engine.train(run)
    return run


def start_of(run, engine, make_run, **changes):
    """What a run begins with that takes its weights from another one."""
    from launcher.engine.distributed import Ranks
    from launcher.engine.setup import build_parts

    other = make_run("second", model={"arch": ARCH, "weights": str(run.path), **changes.pop("model", {})}, **changes)
    return build_parts(other, Ranks(), engine.cpu).model.module.state_dict()


def test_a_run_begins_with_the_best_checkpoint_of_another_and_its_head(trained, engine, make_run):
    from safetensors.torch import load_file

    best = load_file(trained.best_checkpoint / "model.safetensors")
    assert engine.identical(dict(start_of(trained, engine, make_run)), best)


@pytest.mark.parametrize("names", [("ant", "bat", "cod", "doe", "eel", "fly", "hen"), None])
def test_other_classes_get_a_new_head_also_where_they_are_as_many(trained, engine, make_run, names, capsys):
    state = json.loads((trained.best_checkpoint / "state.json").read_text())
    state["classes"] = list(names or reversed(state["classes"]))
    (trained.best_checkpoint.resolve() / "state.json").write_text(json.dumps(state))
    from safetensors.torch import load_file

    best, found = load_file(trained.best_checkpoint / "model.safetensors"), start_of(trained, engine, make_run)
    differing = {name for name in best if not torch.equal(best[name], found[name])}
    assert differing == {"fc.weight", "fc.bias"}
    run = make_run("third", model={"arch": ARCH, "weights": str(trained.path)})
    recipe_checks.check(recipes.read_resolved(run.recipe), str)
    said = capsys.readouterr().out
    assert (
        "a new head is put on for 7 classes (fc.weight, fc.bias): its own is for other classes, or in another" in said
    )


def test_where_the_average_was_best_it_is_taken(trained):
    folder = trained.best_checkpoint.resolve()
    state = json.loads((folder / "state.json").read_text())
    state["early_stopping"]["best"]["weights"] = "ema"
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "ema.safetensors").write_bytes(b"")
    assert ModelConfig(weights=str(trained.path)).weights_file == folder / "ema.safetensors"


def test_the_checkpoint_that_was_best_at_the_start_is_recorded(trained, make_run):
    recipe = recipes.read_resolved(make_run("second", model={"arch": ARCH, "weights": str(trained.path)}).recipe)
    assert absolute(recipe).model.weights == str(trained.best_checkpoint.resolve() / "model.safetensors")


def test_a_run_without_a_best_checkpoint_and_one_of_another_architecture(
    trained, make_run, images, recipe_file, capsys
):
    new = make_run("new", model=SMALL)
    text = f"model: {{arch: resnet18, weights: RUN}}\ndata: {{path: {images}, image_size: 32}}\n"
    assert cli.main([str(recipe_file(text.replace("RUN", str(new.path))))]) == 2
    assert f"{new.path}: this run has no best checkpoint yet" in capsys.readouterr().err
    recipe, _ = recipes.load(str(recipe_file(text.replace("RUN", str(trained.path)))))
    with pytest.raises(RecipeError, match=r"it has the weights of shufflenet_v2_x0_5; give"):
        recipe_checks.check(recipe, str)
