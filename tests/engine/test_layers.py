from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

from launcher.engine import layers
from launcher.engine.model import build_module
from launcher.errors import UsageError
from launcher.recipe.schema import ModelConfig

ARCHS = models.list_models(module=models)
SEVERAL_HEADS = {"googlenet": ("aux1.fc2", "aux2.fc2", "fc"), "inception_v3": ("AuxLogits.fc", "fc")}

build = functools.cache(functools.partial(layers.build_meta, num_classes=7))


def names(model):
    return {name for name, _ in model.named_parameters()}


def match(arch, *patterns):
    return layers.match_parameters(build(arch), patterns, layers.head_modules(arch))


def out_size(module):
    return module.out_channels if isinstance(module, nn.Conv2d) else module.out_features


@pytest.mark.parametrize("arch", ARCHS)
def test_the_head_is_the_layer_that_gives_as_many_outputs_as_there_are_classes(arch):
    model, head = build(arch), layers.head_modules(arch)
    assert [out_size(model.get_submodule(name)) for name in head] == [7] * len(head)
    assert len(head) == len(SEVERAL_HEADS.get(arch, "1"))
    sized_by_classes = {name for name, parameter in model.named_parameters() if parameter.shape[0] == 7}
    assert match(arch, "head") == sized_by_classes


@pytest.mark.parametrize(
    ("arch", "head"),
    [
        *SEVERAL_HEADS.items(),
        ("resnet50", ("fc",)),
        ("squeezenet1_0", ("classifier.1",)),
        ("vit_b_16", ("heads.head",)),
        ("swin_t", ("head",)),
        ("regnet_y_400mf", ("fc",)),
        ("maxvit_t", ("classifier.5",)),
    ],
)
def test_heads_have_these_names(arch, head):
    assert layers.head_modules(arch) == head


@pytest.mark.parametrize("arch", ARCHS)
def test_head_and_backbone_part_all_parameters_and_star_is_all(arch):
    head, backbone = match(arch, "head"), match(arch, "backbone")
    assert head
    assert backbone
    assert not head & backbone
    assert head | backbone == match(arch, "*") == match(arch, "head", "backbone") == names(build(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_described_layers_can_all_be_named_and_add_up(arch, monkeypatch):
    monkeypatch.setattr(layers, "DESCRIBED_CLASSES", 7)
    rows = {row.name: row for row in layers.describe_layers(arch)}
    sizes = {name: parameter.numel() for name, parameter in build(arch).named_parameters()}
    assert sum(row.num_params for row in rows.values() if row.depth == 0) == sum(sizes.values())
    for row in rows.values():
        matched = match(arch, row.name)
        assert row.num_params == sum(sizes[name] for name in matched)
        assert row.is_head == (matched <= match(arch, "head"))
        parts = [part.num_params for part in rows.values() if part.name.rpartition(".")[0] == row.name]
        assert not parts or sum(parts) == row.num_params
    assert set(layers.head_modules(arch)) <= rows.keys()


@pytest.mark.parametrize("arch", ["swin_t", "vit_b_32", "regnet_y_400mf", "googlenet", "convnext_tiny"])
def test_building_on_meta_holds_no_values_and_leaves_the_random_state(arch):
    before = torch.random.get_rng_state()
    model = layers.build_meta(arch, 3)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert torch.equal(torch.random.get_rng_state(), before)


class BiggestOnCpu(TorchDispatchMode):
    """Notes how many elements the biggest tensor has that is made on the CPU."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type == "cpu":
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize("arch", ["resnet18", "swin_t", "vit_b_32", "maxvit_t", "regnet_y_400mf", "convnext_tiny"])
def test_no_big_tensor_is_made_on_the_way_to_meta(arch):
    with BiggestOnCpu() as biggest:
        model = layers.build_meta(arch, 1000)
    assert max(parameter.numel() for parameter in model.parameters()) > 100_000
    assert biggest.numel < 20_000


@pytest.mark.parametrize("arch", ["resnet18", "swin_t", "regnet_y_400mf", "inception_v3"])
def test_the_meta_model_has_the_shapes_of_the_real_one(arch):
    options = {"init_weights": False} if arch == "inception_v3" else {}
    real = models.get_model(arch, weights=None, num_classes=7, **options)
    expected = {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert {name: tensor.shape for name, tensor in build(arch).state_dict().items()} == expected


@given(data=st.data())
def test_a_name_selects_its_own_parameters_and_all_beneath_it_and_no_others(data):
    arch = data.draw(st.sampled_from(["resnet18", "densenet121", "vit_b_32", "googlenet", "efficientnet_b0"]))
    model = build(arch)
    with_parameters = [
        name for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    ]
    name = data.draw(st.sampled_from(with_parameters))
    beneath = {f"{name}.{own}" for own, _ in model.get_submodule(name).named_parameters()}
    assert match(arch, name) == beneath


@pytest.mark.parametrize(
    ("arch", "pattern", "tops"),
    [
        ("resnet18", "layer[12]", {"layer1", "layer2"}),
        ("resnet18", "layer?", {"layer1", "layer2", "layer3", "layer4"}),
        ("efficientnet_b0", "features.[0-4]", {f"features.{block}" for block in range(5)}),
        ("vgg16", "features.1", None),
        ("vgg16", "features.1*", {f"features.{layer}" for layer in (10, 12, 14, 17, 19)}),
        ("vit_b_32", "encoder.layers.encoder_layer_1", {"encoder.layers.encoder_layer_1"}),
        ("vit_b_32", "class_token", {"class_token"}),
        ("vit_b_32", "encoder.pos_embedding", {"encoder.pos_embedding"}),
    ],
)
def test_globs_select_whole_layers(arch, pattern, tops):
    if tops is None:
        with pytest.raises(UsageError, match="without parameters"):  # the ReLU, and not features.10 to features.19
            match(arch, pattern)
    else:
        expected = {name for name in names(build(arch)) if any(f"{name}.".startswith(f"{top}.") for top in tops)}
        assert match(arch, pattern) == expected


def test_a_glob_may_begin_anywhere_in_the_depth():
    found = match("resnet18", "*.bn1")
    assert {name.rpartition(".")[0] for name in found} == {f"layer{n}.{m}.bn1" for n in (1, 2, 3, 4) for m in (0, 1)}


def test_patterns_add_up_and_none_is_nothing():
    assert match("resnet18", "conv1", "bn1", "layer1.0.conv1") == {
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
        "layer1.0.conv1.weight",
    }
    assert match("resnet18") == set()


def test_a_model_built_without_its_auxiliary_heads_has_the_head_that_is_left():
    model = models.googlenet(weights=None, aux_logits=False, init_weights=False, num_classes=7)
    head = layers.match_parameters(model, ["head"], layers.head_modules("googlenet"))
    assert head == {"fc.weight", "fc.bias"}


def test_a_pattern_that_matches_nothing_names_the_nearest_and_the_models_parts():
    with pytest.raises(UsageError) as caught:
        match("resnet18", "conv1", "layr1")
    assert "found 'layr1', which matches no layer of ResNet; did you mean 'layer1'" in str(caught.value)
    assert "valid: head, backbone, *, and names or globs of conv1, bn1, layer1, layer2, layer3, layer4, fc" in str(
        caught.value
    )


def test_layers_without_parameters_are_no_match_and_are_not_proposed():
    with pytest.raises(UsageError) as caught:
        match("resnet18", "relu")
    assert "found 'relu', which is only layers of ResNet without parameters" in str(caught.value)
    assert "did you mean 'relu'" not in str(caught.value)


def test_layers_that_hold_most_parameters_are_opened_and_others_are_not():
    rows = {row.name: row for row in layers.describe_layers("vit_b_32")}
    assert rows["encoder.layers.encoder_layer_11"].depth == 2
    assert rows["class_token"].kind == "Parameter"
    assert "encoder.layers.encoder_layer_11.mlp" not in rows
    assert "conv_proj.weight" not in rows


@pytest.mark.parametrize("arch", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_no_activation_of_ours_has_its_input_copied_for_the_same_gradients(arch):
    """ReLU6, Hardswish and SiLU in place: autograd copies their input, for the derivative needs it."""
    copies, found = [], []
    for wanted in (
        models.get_model(arch, num_classes=3),
        build_module(ModelConfig(arch=arch, weights=None), num_classes=3, image_size=32),
    ):
        torch.manual_seed(0)
        for parameter in wanted.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        images = torch.randn(2, 3, 32, 32)
        with CountClones() as counted:
            wanted.train()(images).square().sum().backward()
        copies.append(counted.num)
        found.append([parameter.grad for parameter in wanted.parameters()])
    assert copies[0] > 10
    assert copies[1] == 0
    assert all(map(torch.equal, *found))


class CountClones(TorchDispatchMode):
    """Notes how often a tensor is copied in the forward pass."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func is torch.ops.aten.clone.default and args[0].dim() == 4
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("mobilenet_v2", True), ("shufflenet_v2_x0_5", True), ("resnet18", True), ("vgg11", False), ("vit_b_32", False)],
)
def test_channels_last_suits_models_with_convolutions_of_one_pixel_or_one_channel(arch, expected):
    assert layers.prefers_channels_last(layers.build_meta(arch, 3)) is expected
