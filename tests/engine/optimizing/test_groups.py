from __future__ import annotations

import pytest
import torch
from torch import nn

from launcher.engine.layers import build_meta
from launcher.engine.model import FineTunedModel
from launcher.engine.optimizing.groups import group_parameters, heights, is_norm_or_bias
from launcher.recipe.schema import ModelConfig, OptimConfig


def model_of(arch):
    return FineTunedModel(build_meta(arch, 7), ModelConfig(arch=arch, weights=None))


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        (
            "vit_b_16",
            {
                "heads.head.weight": 0,
                "encoder.ln.bias": 0,
                "encoder.layers.encoder_layer_11.ln_1.weight": 1,
                "encoder.layers.encoder_layer_0.mlp.0.weight": 12,
                "encoder.pos_embedding": 13,
                "class_token": 13,
                "conv_proj.weight": 13,
            },
        ),
        ("resnet18", {"fc.bias": 0, "layer4.1.bn2.bias": 1, "layer1.0.conv1.weight": 8, "bn1.weight": 9}),
        ("convnext_tiny", {"classifier.0.weight": 0, "features.7.2.layer_scale": 1, "features.0.1.bias": 22}),
        ("vgg11_bn", {"classifier.6.weight": 0, "classifier.3.bias": 1, "features.26.bias": 3, "features.1.bias": 10}),
        ("efficientnet_b0", {"classifier.1.weight": 0, "features.8.0.weight": 1, "features.0.0.weight": 18}),
        (
            "maxvit_t",
            {
                "classifier.5.weight": 0,
                "blocks.3.layers.1.layers.MBconv.layers.conv_a.0.weight": 2,
                "blocks.2.layers.4.layers.grid_attention.mlp_layer.1.bias": 4,
                "blocks.0.layers.0.layers.MBconv.layers.conv_a.0.weight": 12,
                "stem.0.0.weight": 14,
            },
        ),
        ("inception_v3", {"fc.bias": 0, "Mixed_7c.branch1x1.conv.weight": 1, "Conv2d_1a_3x3.bn.bias": 17}),
    ],
)
def test_a_block_is_a_layer_and_the_head_has_none_below_it(arch, expected):
    found = heights(model_of(arch))
    assert {name: found[name] for name in expected} == expected
    assert sorted(set(found.values())) == list(range(max(found.values()) + 1))


def test_the_blocks_of_a_stage_are_layers_whichever_way_it_holds_them():
    """As timm's: ConvNeXt's stages have a downsampling and a list of blocks, RegNet's the blocks themselves."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.blocks = nn.Linear(4, 4), nn.Sequential(Block(), Block())

    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.b1, self.b2 = Block(), Block()

    stages = nn.Sequential(*(stage for _ in range(3) for stage in (Listed(), Direct())))
    net = nn.Sequential(stages, nn.Linear(4, 3))
    found = heights(FineTunedModel(net, ModelConfig(factory="a.py:b"), ["1"], []))
    assert max(found.values()) == 15
    assert (found["0.0.down.bias"], found["0.0.blocks.0.norm.bias"], found["0.1.b2.mlp.0.weight"]) == (15, 14, 11)


def test_each_layer_learns_slower_than_the_one_above_it():
    config = OptimConfig(lr=0.1, layer_decay=0.5, groups={"head": 0.4, "layer4": 0.2})
    groups = group_parameters(model_of("resnet18"), config)
    rates = {name: group["peak_lr"] for group in groups for name in group["names"]}
    assert rates["fc.weight"] == 0.4
    assert rates["layer4.1.conv1.weight"] == pytest.approx(0.2 * 0.5)
    assert rates["layer4.0.conv1.weight"] == pytest.approx(0.2 * 0.5**2)
    assert rates["layer3.1.conv1.weight"] == pytest.approx(0.1 * 0.5**3)
    assert rates["conv1.weight"] == pytest.approx(0.1 * 0.5**9)
    assert len(rates) == len(list(model_of("resnet18").module.named_parameters()))


@pytest.mark.parametrize("arch", ["resnet18", "vit_b_16", "convnext_tiny", "swin_t", "maxvit_t"])
def test_norms_and_biases_decay_unless_the_recipe_says_no(arch):
    for decays in (True, False):
        groups = group_parameters(model_of(arch), OptimConfig(decay_norms=decays, weight_decay=0.1))
        bare = {
            n: p for g in groups if g.get("weight_decay") == 0 for n, p in zip(g["names"], g["params"], strict=True)
        }
        rest = {n: p for g in groups if "weight_decay" not in g for n, p in zip(g["names"], g["params"], strict=True)}
        if decays:
            assert not bare
            continue
        assert all(name.endswith("weight") for name in rest)
        assert all(p.ndim > 1 for p in rest.values())
        others = ("layer_scale", "class_token", "encoder.pos_embedding", "relative_position_bias_table")
        assert all(p.ndim <= 1 or name.endswith(others) for name, p in bare.items())


def test_what_does_not_decay_is_not_moved_by_it(engine):
    model = FineTunedModel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), ModelConfig(), head=())
    groups = group_parameters(model, OptimConfig(decay_norms=False))
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    for parameter in model.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    optimizer.step()
    moved = {name for name, p in model.module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight"}


@pytest.mark.parametrize(
    ("name", "shape", "is_one"),
    [
        ("pos_emb.weight", (16, 8), True),
        ("embeddings.position_embeddings.weight", (16, 8), True),
        ("attn.relative_position_bias_table.weight", (9, 2), True),
        ("attn.attention_biases", (4, 49), True),
        ("debias_matrix", (4, 4), False),
        ("pos_embed.proj.weight", (4, 4), False),
        ("pos_emb.weight", (4, 1, 3, 3), False),
    ],
)
def test_tables_of_positions_and_biases_are_known_by_their_names(name, shape, is_one):
    assert is_norm_or_bias(name, nn.Parameter(torch.zeros(shape))) is is_one
