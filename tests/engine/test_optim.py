from __future__ import annotations

import copy
import typing

import pytest
import torch
from torch import nn

from launcher.engine import optim
from launcher.engine.layers import build_meta
from launcher.engine.model import FineTunedModel
from launcher.engine.optim import build_optimizer, lr_scale, rates, set_lr
from launcher.engine.optimizing import muon
from launcher.engine.optimizing.groups import group_parameters
from launcher.engine.optimizing.kinds import OPTIMIZERS
from launcher.errors import UsageError
from launcher.recipe.schema import ModelConfig, OptimConfig, Recipe
from launcher.recipe.schema_train import TrainConfig


def model_of(arch="resnet18", **config):
    return FineTunedModel(build_meta(arch, 7), ModelConfig(arch=arch, weights=None, **config))


def names_of(model, groups):
    """Group names to the names of their parameters."""
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    return {group["name"]: {names[parameter] for parameter in group["params"]} for group in groups}


def beneath(model, *tops):
    return {name for name, _ in model.module.named_parameters() if any(name.startswith(f"{top}.") for top in tops)}


def test_each_parameter_is_in_the_first_group_that_matches_and_the_rest_in_the_last():
    model = model_of()
    config = OptimConfig(lr=0.01, groups={"head": 1.0, "layer4.1": 0.5, "layer[34]": 0.1})
    groups = group_parameters(model, config)
    assert {group["name"]: group["peak_lr"] for group in groups} == {
        "head": 1.0,
        "layer4.1": 0.5,
        "layer[34]": 0.1,
        "rest": 0.01,
    }
    assert names_of(model, groups) == {
        "head": beneath(model, "fc"),
        "layer4.1": beneath(model, "layer4.1"),
        "layer[34]": beneath(model, "layer3", "layer4.0"),
        "rest": beneath(model, "conv1", "bn1", "layer1", "layer2"),
    }


@pytest.mark.parametrize(
    "groups", [{}, {"*": 0.5}, {"head": 0.1, "*": 0.2}, {"*": 0.2, "head": 0.1}, {"backbone": 0.3}]
)
def test_every_parameter_is_in_exactly_one_group_and_no_group_is_empty(groups):
    model = model_of()
    found = group_parameters(model, OptimConfig(groups=groups))
    members = [parameter for group in found for parameter in group["params"]]
    assert len(members) == len(set(members)) == len(list(model.module.parameters()))
    assert all(group["params"] for group in found)
    if list(groups)[:1] == ["*"]:
        assert [group["name"] for group in found] == ["*"]


def test_a_group_that_matches_nothing_is_an_error():
    with pytest.raises(UsageError, match="layr4"):
        group_parameters(model_of(), OptimConfig(groups={"layr4": 0.1}))


def test_frozen_parameters_are_in_their_groups_too():
    model = model_of(freeze=["backbone"])
    model.freeze(0)
    found = names_of(model, group_parameters(model, OptimConfig(groups={"layer1": 0.1})))
    assert found["layer1"] == beneath(model, "layer1")
    assert found["layer1"] | found["rest"] == {name for name, _ in model.module.named_parameters()}


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.0, False)])
def test_sgd_has_the_recipes_numbers(engine, momentum, nesterov):
    config = OptimConfig(momentum=momentum, weight_decay=0.02, groups={"head": 0.5})
    optimizer = build_optimizer(model_of(), config)
    assert type(optimizer) is torch.optim.SGD
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (momentum, nesterov, 0.02)


def test_adamw_has_the_recipes_numbers(engine):
    optimizer = build_optimizer(model_of(), OptimConfig(name="adamw", weight_decay=0.02))
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02]


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("cosine", 0.5, 0.25),
        ("cosine", 2.0, 1.0),
        ("cosine", 6.0, 0.5),
        ("cosine", 10.0, 0.0),
        ("constant", 1.0, 0.5),
        ("constant", 9.0, 1.0),
    ],
)
def test_every_group_keeps_its_share_of_the_rate_through_training(engine, schedule, progress, factor):
    config = OptimConfig(lr=0.01, schedule=schedule, warmup_epochs=2, groups={"head": 0.4, "layer4": 0.0})
    recipe = Recipe(optim=config, train=TrainConfig(epochs=10))
    optimizer = build_optimizer(model_of(), config)
    for _ in range(2):  # the rate is set, and not multiplied further
        assert set_lr(optimizer, recipe, progress, 256) == pytest.approx(0.4 * factor, abs=1e-12)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"head": 0.4 * factor, "layer4": 0.0, "rest": 0.01 * factor}, abs=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_does_not_touch_what_is_frozen(engine, name):
    model = FineTunedModel(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), ModelConfig(freeze=["0"]))
    before = [p.clone() for p in model.module.parameters()]
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.5))
    model.freeze(0)
    model.module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.module.parameters(), strict=True)]
    assert moved == [False, False, True, True]


@pytest.mark.parametrize(
    ("name", "meant_for", "expected"),
    [
        ("sgd", None, 1.0),
        ("sgd", 64, 4.0),
        ("sgd", 512, 0.5),
        ("adamw", 256, 1.0),
        *((name, 64, 2.0) for name in OPTIMIZERS if name != "sgd"),
    ],
)
def test_rates_follow_the_global_batch_they_are_not_meant_for(name, meant_for, expected):
    config = OptimConfig(name=name, lr=0.01, schedule="constant", lr_batch_size=meant_for)
    assert lr_scale(config, 256) == expected
    optimizer = build_optimizer(model_of(), config)
    assert set_lr(optimizer, Recipe(optim=config), 1.0, 256) == pytest.approx(0.01 * expected)


def test_every_optimizer_of_the_schema_has_a_row():
    assert typing.get_args(typing.get_type_hints(OptimConfig)["name"]) == tuple(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_torchs_own_and_one_that_is_left_out_changes_nothing(engine, name):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    model = FineTunedModel(net, ModelConfig(), head=("1",))
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.01))
    scaler = engine.cpu.grad_scaler("fp32")

    def take(flag):
        optimizer.zero_grad()
        net(torch.ones(2, 6)).square().sum().backward()
        optim.step(optimizer, scaler, torch.tensor(float(flag)))
        return [[p.detach().clone() for p in net.parameters()], copy.deepcopy(optimizer.state_dict()["state"])]

    first = take(0)
    assert engine.identical(take(1), first)
    assert not engine.identical(take(0)[0], first[0])


def test_muon_takes_hidden_matrices_and_adamw_the_rest_each_as_torch_has_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 3))
    other = copy.deepcopy(net)
    config = OptimConfig(name="muon", lr=0.01, groups={"2": 0.02, "head": 0.03}, weight_decay=0.1)
    made = [build_optimizer(FineTunedModel(net, ModelConfig(), head=("3",)), config)]
    for group in made[0].param_groups:
        group["lr"] = group["peak_lr"]
    kernel, bias, matrix, bias2, *head = other.parameters()
    rest = [{"params": [bias2], "lr": 0.02}, {"params": head, "lr": 0.03}, {"params": [kernel, bias]}]
    theirs = [
        torch.optim.Muon([matrix], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, fused=True),
    ]
    for module, optimizers in ((net, made), (other, theirs)):
        for _ in range(3):
            module.zero_grad()
            module(torch.ones(2, 3, 2, 2)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert all(map(torch.equal, net.parameters(), other.parameters()))


@pytest.mark.parametrize(("arch", "num"), [("vit_b_16", 4 * 12), ("convnext_tiny", 2 * 18), ("resnet18", 0)])
def test_which_weights_are_muons(arch, num):
    model = model_of(arch)
    assert len(muon.hidden_matrices(model)) == num
    recipe = Recipe(model=ModelConfig(arch=arch, weights=None), optim=OptimConfig(name="muon"))
    problems = list(muon.problems(recipe, model))
    assert [key for key, _ in problems] == ([] if num else ["optim.name"])


def test_each_groups_rate_is_told_where_there_are_several(engine):
    config = OptimConfig(lr=0.01, groups={"head": 0.4}, decay_norms=False, schedule="constant")
    optimizer = build_optimizer(model_of(), config)
    set_lr(optimizer, Recipe(optim=config), 1.0, 256)
    assert rates(optimizer) == pytest.approx({"lr": 0.4, "lr/head": 0.4, "lr/rest": 0.01})
    assert rates(build_optimizer(model_of(), OptimConfig())) == {"lr": 0.01}
