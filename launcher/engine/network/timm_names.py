"""timm's names of weights, for architectures that torchvision has, as torchvision's; by rules, a few for each family.

ResNet, ResNeXt, Wide ResNet and DenseNet have the same names in both. Nothing of timm is needed for it. Whether the
result fits is told by its shapes, as with any other weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    State = dict[str, torch.Tensor]
Rules = tuple[tuple[str, str], ...]
"""Regular expressions for whole names, each with what takes its place; the first that matches counts."""
END = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"

MADE = ("relative_position_index", "relative_coords_table")
"""Swin's buffers that follow from the architecture: the model's own are right where a file has none."""


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
    flattens: bool = False
    """Whether some of its layers are linear in torchvision and convolutions in timm."""
    differs: str = ""
    """What is other in some of timm's models than in torchvision's, and no weights show; a sentence."""


def family_of(state: State, wanted: Mapping[str, torch.Tensor]) -> tuple[Family, str] | None:
    """The family of timm's weights that a model's are of too, with the prefix of all names; None: there is none."""
    for family in FAMILIES:
        prefix = next((key.removesuffix(family.timm) for key in state if key.endswith(family.timm)), None)
        if family.torchvision in wanted and prefix is not None and f"{prefix}{family.torchvision}" not in state:
            return family, prefix
    return None


def to_torchvision(state: State, wanted: Mapping[str, torch.Tensor]) -> State:
    """``state`` by torchvision's names and in its shapes, if it is timm's of a family that ``wanted`` is of.

    What no rule is for keeps its name, so that it is told as unknown. A prefix of all names is taken off.

    Args:
        state: from a file.
        wanted: the model's own.
    """
    found = family_of(state, wanted)
    if found is None:
        return state
    family, prefix = found
    own = family.change({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    rules = [(re.compile(old), new) for old, new in family.rules(own)]
    named = {_renamed(key, rules): value for key, value in own.items()}
    made = {key: value for key, value in wanted.items() if key.endswith(MADE)}
    return {**made, **{key: _shaped(value, wanted.get(key), family) for key, value in named.items()}}


def _renamed(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    return next((old.sub(new, key) for old, new in rules if old.fullmatch(key)), key)


def _shaped(value: torch.Tensor, wanted: torch.Tensor | None, family: Family) -> torch.Tensor:
    """Layer scales are C x 1 x 1 in torchvision; some families' layers after the pooling are linear there."""
    dims = (value.dim(), wanted.dim() if wanted is not None else None)
    if dims == (1, 3) and wanted is not None and wanted.shape[1:] == (1, 1):
        return value.reshape(-1, 1, 1)
    return value.flatten(1) if family.flattens and dims == (4, 2) else value


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
        (rf"head\.norm{END}", r"classifier.0.\1"),
        (rf"head\.fc{END}", r"classifier.2.\1"),
    )


@dataclass(frozen=True, kw_only=True)
class _Block:
    """An inverted residual of timm's, ``blocks.STAGE.NUMBER``."""

    stage: int
    number: int
    before: int
    """How many blocks of the network come before it."""
    layers: tuple[str, ...]
    """In the order of computation. ``se`` is squeeze and excitation; all others have a norm."""

    def rules(self, named: Callable[[_Block, int], tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Its rules.

        Args:
            named: what torchvision calls the layer in a place and its norm; of ``se`` the first is what fc1 is in.
        """
        here, num_norms = rf"blocks\.{self.stage}\.{self.number}", 0
        for place, layer in enumerate(self.layers):
            there, norm = named(self, place)
            if layer == "se":
                yield rf"{here}\.se\.conv_reduce{END}", rf"{there}.fc1.\1"
                yield rf"{here}\.se\.conv_expand{END}", rf"{there}.fc2.\1"
                continue
            num_norms += 1
            yield rf"{here}\.{layer}{END}", rf"{there}.\1"
            yield rf"{here}\.bn{num_norms}{END}", rf"{norm}.\1"


def _blocks(state: State) -> list[_Block]:
    """A block is what it has: an expansion or none, squeeze and excitation or none."""
    layers: dict[tuple[int, int], set[str]] = {}
    for key in state:
        if found := re.match(r"blocks\.(\d+)\.(\d+)\.(\w+)", key):
            layers.setdefault((int(found[1]), int(found[2])), set()).add(found[3])
    blocks = []
    for before, ((stage, number), names) in enumerate(sorted(layers.items())):
        order: tuple[str, ...] = ("conv", "conv_exp", "conv_pw", "conv_dw", "se", "conv_pwl")
        if "conv_dw" in names and "conv_pwl" not in names:  # without an expansion the pointwise layer comes last
            order = ("conv_dw", "se", "conv_pw")
        there = tuple(name for name in order if name in names)
        blocks.append(_Block(stage=stage, number=number, before=before, layers=there))
    return blocks


def _around(blocks: list[_Block], named: Callable[[_Block, int], tuple[str, str]], **names: str) -> Rules:
    """Rules of a network of such blocks; ``names``: of timm's layers around them."""
    rules = [(rf"{timm}{END}", rf"{ours}.\1") for timm, ours in names.items()]
    return (*rules, *(rule for block in blocks for rule in block.rules(named)))


def _between(blocks: list[_Block], named: Callable[[_Block, int], tuple[str, str]], *, last: str) -> Rules:
    """Rules of a network that is one ``features``, whose ``last`` is a convolution with its norm."""
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": f"{last}.0", "bn2": f"{last}.1"}
    return _around(blocks, named, **ends, classifier="classifier.1")


def _efficientnet(state: State) -> Rules:
    def named(block: _Block, place: int) -> tuple[str, str]:
        there = f"features.{block.stage + 1}.{block.number}.block.{place}"
        return (there, "") if block.layers[place] == "se" else (f"{there}.0", f"{there}.1")

    blocks = _blocks(state)
    last = f"features.{max((block.stage for block in blocks), default=-1) + 2}"
    return _between(blocks, named, last=last)


def _mobilenet_v3(state: State) -> Rules:
    """Its last block is a plain convolution; what follows the pooling is a convolution in timm."""

    def named(block: _Block, place: int) -> tuple[str, str]:
        there = f"features.{block.before + 1}"
        there = there if block.layers == ("conv",) else f"{there}.block.{place}"
        return (there, "") if block.layers[place] == "se" else (f"{there}.0", f"{there}.1")

    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": "classifier.0"}
    return _around(_blocks(state), named, **ends, classifier="classifier.3")


def _mobilenet_v2(state: State) -> Rules:
    def named(block: _Block, place: int) -> tuple[str, str]:
        there = f"features.{block.before + 1}.conv"
        is_last = place == len(block.layers) - 1
        return (f"{there}.{place}", f"{there}.{place + 1}") if is_last else (f"{there}.{place}.0", f"{there}.{place}.1")

    blocks = _blocks(state)
    last = f"features.{len(blocks) + 1}"
    return _between(blocks, named, last=last)


def _mnasnet(state: State) -> Rules:
    """Layers, norms and activations are counted through; the first block is a part of the stem."""

    def named(block: _Block, place: int) -> tuple[str, str]:
        there = f"layers.{7 + block.stage}.{block.number}.layers" if block.stage else "layers"
        first = 3 * place + (0 if block.stage else 3)
        return f"{there}.{first}", f"{there}.{first + 1}"

    ends = {"conv_stem": "layers.0", "bn1": "layers.1", "conv_head": "layers.14", "bn2": "layers.15"}
    return _around(_blocks(state), named, **ends, classifier="classifier.1")


def _regnet(state: State) -> Rules:
    """Timm counts stages and blocks from 1."""
    rules = [(rf"stem\.conv{END}", r"stem.0.\1"), (rf"stem\.bn{END}", r"stem.1.\1"), (rf"head\.fc{END}", r"fc.\1")]
    parts = {"conv1": "f.a", "conv2": "f.b", "conv3": "f.c", "downsample": "proj"}
    blocks = {found.groups() for key in state if (found := re.match(r"s(\d)\.b(\d+)\.", key))}
    for stage, number in sorted(blocks):
        here, there = rf"s{stage}\.b{number}", f"trunk_output.block{stage}.block{stage}-{int(number) - 1}"
        for timm, ours in parts.items():
            rules.append((rf"{here}\.{timm}\.conv{END}", rf"{there}.{ours}.0.\1"))
            rules.append((rf"{here}\.{timm}\.bn{END}", rf"{there}.{ours}.1.\1"))
        rules.append((rf"{here}\.se\.fc([12]){END}", rf"{there}.f.se.fc\1.\2"))
    return tuple(rules)


def _vgg(_: State) -> Rules:
    """Its hidden layers are convolutions in timm."""
    return (
        (rf"pre_logits\.fc1{END}", r"classifier.0.\1"),
        (rf"pre_logits\.fc2{END}", r"classifier.3.\1"),
        (rf"head\.fc{END}", r"classifier.6.\1"),
    )


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
    """Version 2 has biases of queries and values alone.

    Buffers that follow from the window are kept where a file has them: one of another window is told by their shapes,
    and coordinates that `pretrained_window_size` scales are the file's.
    """
    found = {
        key: value.flatten() if key.endswith("relative_position_index") else value
        for key, value in state.items()
        if not key.endswith("attn_mask")
    }
    for key in [key for key in found if key.endswith(".q_bias")]:
        query, value = found.pop(key), found.pop(key.replace("q_bias", "v_bias"))
        found[key.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    return found


MAPPED = "ResNet, DenseNet, ConvNeXt, ViT, Swin, EfficientNet, MobileNetV2 and V3, MNASNet, RegNet and VGG"
"""Families whose names are the same in both, or which there are rules for."""
MEANS = "many of timm's were trained with data.mean and data.std of 0.5"
OF_GOOGLE = (
    "of timm's models those called tf_… pad in another way, and others have another epsilon in their BatchNorm: logits "
    f"differ a little from theirs; {MEANS}"
)
WINDOWS = (
    "a window's size shows in no weight: of timm's models those of another window or pretrained_window_size than "
    "torchvision's compute something else"
)
FAMILIES = (
    Family(timm="blocks.0.attn.qkv.weight", torchvision="encoder.pos_embedding", rules=_vit, differs=MEANS),
    Family(timm="stages.0.blocks.0.conv_dw.weight", torchvision="features.1.0.layer_scale", rules=_convnext),
    *(
        Family(
            timm="conv_stem.weight",
            torchvision=name,
            rules=rules,
            flattens=rules is _mobilenet_v3,
            differs=OF_GOOGLE,
        )
        for name, rules in (
            ("features.1.0.block.0.0.weight", _efficientnet),
            ("features.1.block.0.0.weight", _mobilenet_v3),
            ("features.1.conv.0.0.weight", _mobilenet_v2),
            ("layers.8.0.layers.0.weight", _mnasnet),
        )
    ),
    Family(timm="s1.b1.conv1.conv.weight", torchvision="trunk_output.block1.block1-0.f.a.0.weight", rules=_regnet),
    Family(timm="pre_logits.fc1.weight", torchvision="classifier.6.weight", rules=_vgg, flattens=True),
    Family(
        timm="layers.0.blocks.0.attn.logit_scale",
        torchvision="features.1.0.attn.logit_scale",
        rules=_swin,
        change=_change_swin,
        differs=WINDOWS,
    ),
    Family(
        timm="layers.0.blocks.0.attn.qkv.weight",
        torchvision="features.1.0.attn.qkv.weight",
        rules=_swin,
        change=_change_swin,
    ),
)
