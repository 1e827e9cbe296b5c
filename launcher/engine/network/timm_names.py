"""timm's names of weights, for architectures that torchvision has, as torchvision's; by rules, a few for each family.

ResNet, ResNeXt and Wide ResNet have the same names in both. Nothing of timm is needed for it. Whether the result fits
is told by its shapes, as with any other weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    State = dict[str, torch.Tensor]
Rules = tuple[tuple[str, str], ...]
"""Regular expressions for whole names, each with what takes its place; the first that matches counts."""
END = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Architectures whose weights are named by the same rules."""

    timm: str
    """A name that timm's weights of it have, and torchvision's have not."""
    torchvision: str
    """The same the other way round."""
    rules: Callable[[State], Rules]
    """For a state dict of timm's."""
    change: Callable[[State], State] = lambda state: state
    """What is done to it before."""


def to_torchvision(state: State, wanted: Mapping[str, torch.Tensor]) -> State:
    """``state`` by torchvision's names and in its shapes, if it is timm's of a family that ``wanted`` is of.

    What no rule is for keeps its name, so that it is told as unknown. A prefix of all names is taken off.

    Args:
        state: from a file.
        wanted: the model's own.
    """
    for family in FAMILIES:
        prefix = next((key.removesuffix(family.timm) for key in state if key.endswith(family.timm)), None)
        if family.torchvision in wanted and prefix is not None and f"{prefix}{family.torchvision}" not in state:
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            own = family.change(own)
            rules = [(re.compile(old), new) for old, new in family.rules(own)]
            named = {_renamed(key, rules): value for key, value in own.items()}
            return {key: _shaped(value, wanted.get(key)) for key, value in named.items()}
    return state


def _renamed(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    return next((old.sub(new, key) for old, new in rules if old.fullmatch(key)), key)


def _shaped(value: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """Layer scales are C x 1 x 1 in torchvision."""
    is_scale = wanted is not None and wanted.dim() == 3 and wanted.shape[1:] == (1, 1)  # noqa: PLR2004
    return value.reshape(-1, 1, 1) if is_scale and value.dim() == 1 else value


# --- the families


def _vit(_: State) -> Rules:
    block = r"blocks\.(\d+)\."
    layer = r"encoder.layers.encoder_layer_\1."
    return (
        (r"cls_token", "class_token"),
        (r"pos_embed", "encoder.pos_embedding"),
        (rf"patch_embed\.proj{END}", r"conv_proj.\1"),
        (rf"{block}norm([12]){END}", rf"{layer}ln_\2.\3"),
        (rf"{block}attn\.qkv\.(weight|bias)", rf"{layer}self_attention.in_proj_\2"),
        (rf"{block}attn\.proj{END}", rf"{layer}self_attention.out_proj.\2"),
        (rf"{block}mlp\.fc1{END}", rf"{layer}mlp.0.\2"),
        (rf"{block}mlp\.fc2{END}", rf"{layer}mlp.3.\2"),
        (rf"norm{END}", r"encoder.ln.\1"),
        (rf"head{END}", r"heads.head.\1"),
    )


def _convnext(state: State) -> Rules:
    stages = range(sum(1 for key in state if re.fullmatch(r"stages\.\d+\.blocks\.0\.conv_dw\.weight", key)))
    of_stage = [
        rule
        for stage in stages
        for block, own in [(rf"stages\.{stage}\.blocks\.(\d+)\.", rf"features.{2 * stage + 1}.\1.")]
        for rule in (
            (rf"{block}conv_dw{END}", rf"{own}block.0.\2"),
            (rf"{block}norm{END}", rf"{own}block.2.\2"),
            (rf"{block}mlp\.fc1{END}", rf"{own}block.3.\2"),
            (rf"{block}mlp\.fc2{END}", rf"{own}block.5.\2"),
            (rf"{block}gamma", rf"{own}layer_scale"),
            (rf"stages\.{stage}\.downsample\.([01]){END}", rf"features.{2 * stage}.\1.\2"),
        )
    ]
    return (
        (rf"stem\.([01]){END}", r"features.0.\1.\2"),
        *of_stage,
        (rf"(?:head\.norm|norm_pre){END}", r"classifier.0.\1"),
        (rf"head\.fc{END}", r"classifier.2.\1"),
    )


def _efficientnet(state: State) -> Rules:
    """A block is what it has: an expansion or none, squeeze and excitation or none."""
    layers: dict[str, set[str]] = {}
    for key in state:
        if found := re.match(r"(blocks\.(\d+)\.\d+)\.(\w+)", key):
            layers.setdefault(found[1], set()).add(found[3])
    stages = len({block.split(".")[1] for block in layers})
    rules: list[tuple[str, str]] = [(rf"conv_stem{END}", r"features.0.0.\1"), (rf"bn1{END}", r"features.0.1.\1")]
    for block, names in layers.items():
        _, stage, number = block.split(".")
        own, there = rf"features.{int(stage) + 1}.{number}.block", re.escape(block)
        order = [name for name in ("conv", "conv_exp", "conv_pw", "conv_dw", "se", "conv_pwl") if name in names]
        if "conv_dw" in names and "conv_pwl" not in names:  # without an expansion the pointwise layer comes last
            order = [name for name in ("conv_dw", "se", "conv_pw") if name in names]
        place_of_norm = 0
        for place, name in enumerate(order):
            if name == "se":
                rules += [
                    (rf"{there}\.se\.conv_reduce{END}", rf"{own}.{place}.fc1.\1"),
                    (rf"{there}\.se\.conv_expand{END}", rf"{own}.{place}.fc2.\1"),
                ]
                continue
            place_of_norm += 1
            rules += [
                (rf"{there}\.{name}{END}", rf"{own}.{place}.0.\1"),
                (rf"{there}\.bn{place_of_norm}{END}", rf"{own}.{place}.1.\1"),
            ]
    last = [(rf"conv_head{END}", rf"features.{stages + 1}.0.\1"), (rf"bn2{END}", rf"features.{stages + 1}.1.\1")]
    return (*rules, *last, (rf"classifier{END}", r"classifier.1.\1"))


def _swin(state: State) -> Rules:
    """Timm merges patches at the end of a stage, since 0.9 at the beginning of the next."""
    at_end = any(key.startswith("layers.0.downsample.") for key in state)
    stages = {int(key.split(".")[1]) for key in state if key.startswith("layers.")}
    of_stage = [
        rule
        for stage in sorted(stages)
        for rule in (
            (rf"layers\.{stage}\.blocks\.(\d+)\.mlp\.fc1{END}", rf"features.{2 * stage + 1}.\1.mlp.0.\2"),
            (rf"layers\.{stage}\.blocks\.(\d+)\.mlp\.fc2{END}", rf"features.{2 * stage + 1}.\1.mlp.3.\2"),
            (rf"layers\.{stage}\.blocks\.(\d+)\.(.+)", rf"features.{2 * stage + 1}.\1.\2"),
            (rf"layers\.{stage}\.downsample\.(.+)", rf"features.{2 * stage + 2 * at_end}.\1"),
        )
    ]
    return (
        (rf"patch_embed\.proj{END}", r"features.0.0.\1"),
        (rf"patch_embed\.norm{END}", r"features.0.2.\1"),
        *of_stage,
        (rf"head\.fc{END}", r"head.\1"),
    )


def _change_swin(state: State) -> State:
    """What follows from the architecture is left out; version 2 has biases of queries and values alone."""
    made = ("relative_position_index", "relative_coords_table", "attn_mask")
    found = {key: value for key, value in state.items() if not key.endswith(made)}
    for key in [key for key in found if key.endswith(".q_bias")]:
        query, value = found.pop(key), found.pop(key.replace("q_bias", "v_bias"))
        found[key.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    return found


FAMILIES = (
    Family(timm="blocks.0.attn.qkv.weight", torchvision="encoder.pos_embedding", rules=_vit),
    Family(timm="stages.0.blocks.0.conv_dw.weight", torchvision="features.1.0.layer_scale", rules=_convnext),
    Family(timm="conv_stem.weight", torchvision="features.1.0.block.0.0.weight", rules=_efficientnet),
    Family(
        timm="layers.0.blocks.0.attn.qkv.weight",
        torchvision="features.1.0.attn.qkv.weight",
        rules=_swin,
        change=_change_swin,
    ),
)
