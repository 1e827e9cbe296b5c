"""timm's weights in torchvision's architectures: the same logits, where timm is installed; else the rules alone."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from launcher.engine.layers import build_meta
from launcher.engine.network.fitting import check_finite, fit_weights, load_weights
from launcher.engine.network.timm_names import MADE
from launcher.engine.weights_file import read_weights_file
from launcher.errors import UsageError
from launcher.recipe.schema import ModelConfig

PAIRS = {  # torchvision's name, timm's, image size
    "resnet18": ("resnet18", 64),
    "resnext50_32x4d": ("resnext50_32x4d", 64),
    "convnext_tiny": ("convnext_tiny", 64),
    "vit_b_32": ("vit_base_patch32_224", 224),
    "efficientnet_b0": ("efficientnet_b0", 64),
    "efficientnet_v2_s": ("efficientnetv2_s", 64),
    "swin_t": ("swin_tiny_patch4_window7_224", 224),
    "densenet121": ("densenet121", 64),
    "mobilenet_v2": ("mobilenetv2_100", 64),
    "mobilenet_v3_small": ("mobilenetv3_small_100", 64),
    "mnasnet0_5": ("mnasnet_050", 64),
    "regnet_y_400mf": ("regnety_004", 64),
    "vgg11_bn": ("vgg11_bn", 64),
    "inception_v3": ("inception_v3", 299),
}


def random_state(net):
    """Weights and statistics of no special values: an error of the order would be seen."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            low, high = (0.5, 1.5) if "running_var" in name else (-0.1, 0.1)
            tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    return net.eval()


@pytest.mark.slow
@pytest.mark.parametrize("arch", PAIRS)
@torch.no_grad()
def test_the_logits_are_timms(arch, tmp_path):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    name, size = PAIRS[arch]
    theirs = random_state(timm.create_model(name, num_classes=7))
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "w.pth")
    options = {"image_size": size} if arch.startswith("vit") else {}
    ours = models.get_model(arch, weights=None, num_classes=7, **options).eval()
    load_weights(ours, ModelConfig(arch=arch, weights=str(tmp_path / "w.pth")), image_size=size)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    for layers in (ours.modules(), theirs.modules()):  # whose epsilon is the architecture's, not the weights'
        for layer in layers:
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.eps = 1e-5
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-4)


VIT = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj",
    "norm": "encoder.ln",
    "head": "heads.head",
    **{
        f"blocks.{n}.{timm}": f"encoder.layers.encoder_layer_{n}.{ours}"
        for n in range(12)
        for timm, ours in {
            "norm1": "ln_1",
            "norm2": "ln_2",
            "attn.qkv": "self_attention.in_proj",
            "attn.proj": "self_attention.out_proj",
            "mlp.fc1": "mlp.0",
            "mlp.fc2": "mlp.3",
        }.items()
    },
}


def as_timm(state):
    """A state of torchvision's ViT as timm writes it, by a table that is independent of the rules."""
    back = {ours: timm for timm, ours in VIT.items()}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if key in back:
            yield back[key], value
        elif module.endswith("self_attention") and kind.startswith("in_proj_"):
            yield f"{back[f'{module}.in_proj']}.{kind.removeprefix('in_proj_')}", value
        else:
            yield f"{back[module]}.{kind}", value


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return models.vit_b_32(weights=None, num_classes=7, image_size=64)


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
def test_every_weight_of_a_vision_transformer_finds_its_place(vit, tmp_path, prefix):
    state = vit.state_dict()
    save_file({f"{prefix}{k}": v.clone() for k, v in as_timm(state)}, tmp_path / "w.safetensors")
    found = read_weights_file(tmp_path / "w.safetensors", build_meta("vit_b_32", 7).state_dict()).state
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_its_positions_are_interpolated_to_another_size_of_images(vit, tmp_path):
    save_file({k: v.clone() for k, v in as_timm(vit.state_dict())}, tmp_path / "w.safetensors")
    other = models.vit_b_32(weights=None, num_classes=7, image_size=96)
    load_weights(other, ModelConfig(arch="vit_b_32", weights=str(tmp_path / "w.safetensors")), image_size=96)
    positions = other.encoder.pos_embedding
    assert positions.shape == (1, 1 + 3 * 3, 768)
    assert torch.equal(positions[:, 0], vit.encoder.pos_embedding[:, 0])
    assert torch.isfinite(other.eval()(torch.rand(1, 3, 96, 96))).all()


def test_what_does_not_fit_is_listed(vit, tmp_path):
    state = dict(as_timm(vit.state_dict()))
    state["blocks.3.ls1.gamma"] = torch.ones(768)  # of DeiT III, which torchvision has not
    del state["blocks.4.mlp.fc1.weight"]
    state["blocks.5.mlp.fc2.weight"] = torch.ones(3, 2)
    torch.save(state, tmp_path / "w.pth")
    module, config = build_meta("vit_b_32", 7), ModelConfig(arch="vit_b_32", weights=str(tmp_path / "w.pth"))
    with pytest.raises(UsageError) as caught:
        fit_weights(read_weights_file(tmp_path / "w.pth", module.state_dict()).state, module, config, image_size=224)
    assert str(caught.value).endswith(
        "does not fit vit_b_32: 1 keys missing: encoder.layers.encoder_layer_4.mlp.0.weight; 1 keys unknown: "
        "blocks.3.ls1.gamma; 1 of another shape: encoder.layers.encoder_layer_5.mlp.3.weight (3x2, needs 768x3072)"
    )


def test_torchvisions_own_names_stay(vit):
    from launcher.engine.network.timm_names import to_torchvision

    for state, wanted in (
        (vit.state_dict(), vit.state_dict()),
        ({"conv_stem.weight": torch.ones(1)}, vit.state_dict()),
    ):
        assert to_torchvision(state, wanted) is state


SWIN = (  # torchvision's, and timm's of before 0.9
    (r"features\.0\.0\.", "patch_embed.proj."),
    (r"features\.0\.2\.", "patch_embed.norm."),
    *((rf"features\.{2 * stage + 1}\.(\d+)\.", rf"layers.{stage}.blocks.\1.") for stage in range(4)),
    *((rf"features\.{2 * stage + 2}\.", f"layers.{stage}.downsample.") for stage in range(3)),
    (r"(.*)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"(.*)\.mlp\.3\.", r"\1.mlp.fc2."),
)


def test_buffers_that_a_model_on_the_meta_device_makes_are_no_bad_weights(tmp_path):
    module, state = build_meta("swin_v2_t", 7), {}
    for name, value in module.state_dict().items():
        for ours, timms in SWIN:
            name = re.sub(f"^{ours}", timms, name)  # noqa: PLW2901
        if not name.endswith(MADE):
            state[name] = torch.zeros(value.shape)
    save_file(state, tmp_path / "w.safetensors")
    config = ModelConfig(arch="swin_v2_t", weights=str(tmp_path / "w.safetensors"))
    found = read_weights_file(tmp_path / "w.safetensors", module.state_dict()).state
    assert fit_weights(found, module, config, image_size=256).keys() == module.state_dict().keys()
    check_finite(found, config)
    found["norm.weight"][3] = float("nan")
    with pytest.raises(UsageError, match=r"NaN or infinite values in norm\.weight"):
        check_finite(found, config)


def test_a_variant_with_other_positions_is_told_and_no_error_of_ours(vit, tmp_path):
    state = dict(as_timm(vit.state_dict()))
    state["pos_embed"] = state["pos_embed"][:, 1:]  # as of DeiT III, whose class token has none
    torch.save(state, tmp_path / "w.pth")
    other = models.vit_b_32(weights=None, num_classes=7, image_size=96)
    config = ModelConfig(arch="vit_b_32", weights=str(tmp_path / "w.pth"))
    with pytest.raises(UsageError, match=r"1 of another shape: encoder\.pos_embedding \(1x4x768, needs 1x10x768\)"):
        load_weights(other, config, image_size=96)


def as_timms_mobile(net, depths):
    """The state of a MobileNet as timm writes it, by torchvision's modules in their order.

    Args:
        net: torchvision's.
        depths: how many blocks each of timm's stages has.
    """
    blocks = [(stage, number) for stage, depth in enumerate(depths) for number in range(depth)]
    stem, *features = net.features.children()
    last = features.pop() if len(features) > len(blocks) else None
    named = [("conv_stem", stem[0]), ("bn1", stem[1])]
    for (stage, number), block in zip(blocks, features, strict=True):
        parts = [part for part in block.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.BatchNorm2d)]
        found, norms = {part: name for name, part in block.named_modules()}, 0
        layers = [part for part in parts if isinstance(part, torch.nn.Conv2d) and ".fc" not in found[part]]
        few = {1: ["conv"], 2: ["conv_dw", "conv_pw"], 3: ["conv_pw", "conv_dw", "conv_pwl"]}[len(layers)]
        names = dict(zip(layers, few, strict=True))
        for part in parts:
            norms += isinstance(part, torch.nn.BatchNorm2d)
            squeeze = {"fc1": "se.conv_reduce", "fc2": "se.conv_expand"}.get(found[part].rpartition(".")[2])
            named.append((f"blocks.{stage}.{number}.{squeeze or names.get(part) or f'bn{norms}'}", part))
    named += [("conv_head", last[0]), ("bn2", last[1])] if last else [("conv_head", net.classifier[0])]
    named.append(("classifier", net.classifier[-1]))
    state = {f"{name}.{key}": value for name, part in named for key, value in part.state_dict().items()}
    if not last:
        state["conv_head.weight"] = state["conv_head.weight"][:, :, None, None]
    return state


@pytest.mark.parametrize(
    ("arch", "depths"), [("mobilenet_v2", (1, 2, 3, 4, 3, 3, 1)), ("mobilenet_v3_small", (1, 2, 3, 2, 3, 1))]
)
def test_every_weight_of_a_mobilenet_finds_its_place(arch, depths, tmp_path):
    torch.manual_seed(0)
    net = random_state(models.get_model(arch, weights=None, num_classes=7))
    torch.save(as_timms_mobile(net, depths), tmp_path / "w.pth")
    found = read_weights_file(tmp_path / "w.pth", build_meta(arch, 7).state_dict())
    assert found.is_timms
    assert found.state.keys() == net.state_dict().keys()
    assert all(torch.equal(found.state[key], value) for key, value in net.state_dict().items())


def problems_of(state, arch, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    module, config = build_meta(arch, 7), ModelConfig(arch=arch, weights=str(tmp_path / "w.pth"))
    found = read_weights_file(tmp_path / "w.pth", module.state_dict())
    try:
        return fit_weights(found.state, module, config, image_size=256)
    except UsageError as error:
        return str(error)


CONVNEXT = (
    *((rf"features\.{2 * stage}\.", f"stages.{stage}.downsample.") for stage in range(1, 4)),
    (r"features\.0\.", "stem."),
    *((rf"features\.{2 * stage + 1}\.(\d+)\.", rf"stages.{stage}.blocks.\1.") for stage in range(4)),
    *((rf"(.*)\.block\.{place}\.", rf"\1.{name}.") for place, name in ((0, "conv_dw"), (2, "norm"), (3, "mlp.fc1"))),
    (r"(.*)\.block\.5\.", r"\1.mlp.fc2."),
    (r"(.*)\.layer_scale", r"\1.gamma"),
    (r"classifier\.2\.", "head.fc."),
)


@pytest.mark.parametrize("norm", ["head.norm", "norm_pre"])
def test_a_convnext_with_its_last_norm_before_the_pooling_is_another_variant(norm, tmp_path):
    state = {}
    for name, value in build_meta("convnext_tiny", 7).state_dict().items():
        for ours, timms in (*CONVNEXT, (r"classifier\.0\.", f"{norm}.")):
            name = re.sub(f"^{ours}", timms, name)  # noqa: PLW2901
        is_conv = norm == "norm_pre" and ".mlp." in name and value.dim() > 1
        state[name] = torch.zeros((*value.shape, 1, 1) if is_conv else value.shape)
    found = problems_of(state, "convnext_tiny", tmp_path)
    if norm == "head.norm":
        assert isinstance(found, dict)
    else:
        assert "2 keys missing: classifier.0.weight" in found
        assert "2 keys unknown: norm_pre.weight" in found
        assert "36 of another shape" in found


def test_a_swin_of_another_window_is_told_by_its_buffers_and_coordinates_are_the_files(tmp_path):
    state = models.swin_v2_t(num_classes=7).state_dict()
    for name in list(state):
        named = name
        for ours, timms in SWIN:
            named = re.sub(f"^{ours}", timms, named)
        value = state.pop(name)
        state[named] = value.reshape(64, 64) if name.endswith("relative_position_index") else value
    table = "layers.0.blocks.0.attn.relative_coords_table"
    state[table] = state[table] / 2  # as of a larger pretrained_window_size
    assert torch.equal(
        problems_of(state, "swin_v2_t", tmp_path)["features.1.0.attn.relative_coords_table"], state[table]
    )
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(256, 256, dtype=torch.int64)
    text = "1 of another shape: features.1.0.attn.relative_position_index (65536, needs 4096)"
    assert problems_of(state, "swin_v2_t", tmp_path).endswith(text)


@pytest.mark.parametrize("arch", ["efficientnet_b0", "mobilenet_v2"])
def test_a_stem_without_blocks_is_told_as_keys_that_are_missing(arch, tmp_path):
    assert "keys missing" in problems_of({"conv_stem.weight": torch.zeros(32, 3, 3, 3)}, arch, tmp_path)
