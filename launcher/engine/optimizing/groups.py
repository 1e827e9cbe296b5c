"""Which parameters learn at which rate, and which of them decay: by pattern, by depth and by kind."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from launcher.engine.layers import HEAD
from launcher.engine.optimizing import muon

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from launcher.engine.model import FineTunedModel
    from launcher.recipe.schema import OptimConfig, Recipe

REST = "rest"
"""Name of the group of what no pattern matches."""
PLAIN_STACK = 3
"""A stack of more layers without parts, as VGG's convolutions, is as many layers; one of fewer is one (a convolution
with its normalisation)."""

NOT_DECAYED = re.compile(r"(.*_)?bias(es|_table)?|.*pos(ition)?_emb.*")
"""Names of parameters that have several dimensions and are no weights."""
MATRIX = 2
"""Dimensions of an embedding's table, which is called after its layer: ``pos_emb.weight``."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def group_parameters(model: FineTunedModel, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups, the first pattern that matches a parameter counts; what none matches learns at ``optim.lr``.

    With ``optim.layer_decay`` a group is one for each depth, with ``optim.decay_norms: false`` one for what decays and
    one for what does not. Frozen parameters are in them too: without a gradient an optimizer leaves them alone, and one
    that is unfrozen later needs no new optimizer.

    Returns:
        ``{name, names, params, peak_lr}`` each, none of them empty, and ``weight_decay`` of what does not decay;
        ``names`` are those of its parameters. With ``optim.name: muon`` each says whether it is Muon's. Groups of one
        name have one rate.
    """
    parameters = dict(model.module.named_parameters())
    above = heights(model) if config.layer_decay is not None else {}
    of_muon = muon.hidden_matrices(model) if config.name == "muon" else set()
    groups: dict[tuple[str, int, bool, bool], list[str]] = {}
    for pattern, names in deal_names(model, config.groups):
        for name in names:
            decays = config.decay_norms or not is_norm_or_bias(name, parameters[name])
            groups.setdefault((pattern, above.get(name, 0), decays, name in of_muon), []).append(name)
    return [
        {
            "name": f"{pattern}-{height}" if above else pattern,
            "names": names,
            "params": [parameters[name] for name in names],
            "peak_lr": config.groups.get(pattern, config.lr) * (config.layer_decay or 1.0) ** height,
            **({} if decays else {"weight_decay": 0.0}),
            **({muon.OF_MUON: is_muons} if config.name == "muon" else {}),
        }
        for (pattern, height, decays, is_muons), names in groups.items()
    ]


def deal_names(model: FineTunedModel, patterns: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Each pattern with the names of the parameters that it is the first to match; what is left is ``rest``."""
    left = [name for name, _ in model.module.named_parameters()]
    dealt = []
    for pattern in patterns:
        matched = model.matching([pattern])
        dealt.append((pattern, [name for name in left if name in matched]))
        left = [name for name in left if name not in matched]
    return [(pattern, names) for pattern, names in [*dealt, (REST, left)] if names]


def problems(recipe: Recipe, model: FineTunedModel) -> Iterator[tuple[str, str]]:
    """Groups of a recipe, whose patterns are right, for which those before them leave nothing: the keys, and words."""
    every = {"optim.groups": recipe.optim.groups}
    every |= {f"train.phases.{n}.optim.groups": one.optim.groups or {} for n, one in enumerate(recipe.train.phases)}
    for key, groups in every.items():
        dealt = dict(deal_names(model, groups))
        for pattern in groups:
            if pattern not in dealt:
                own = model.matching([pattern])
                takers = [f"`{other}`" for other, names in dealt.items() if not own.isdisjoint(names)]
                come, them = ("comes", "it") if len(takers) == 1 else ("come", "them")
                text = f"all that it matches is taken by {' and '.join(takers)}, which {come} first"
                yield f"{key}.{pattern}", f"{text}; put it before {them}"


def is_norm_or_bias(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is of a normalisation, a bias or an embedding of positions.

    That is what has one dimension (layer scales and a class token, too) and, by name, Swin's tables of biases and
    position embeddings: what timm and torchvision's own trainings leave out.
    """
    *_, layer, own = ["", *name.split(".")]
    called = layer if own == "weight" and parameter.ndim == MATRIX else own
    if parameter.ndim <= 1 or NOT_DECAYED.fullmatch(called):
        return True
    return not own.endswith("weight") and sum(size > 1 for size in parameter.shape) <= 1


def heights(model: FineTunedModel) -> dict[str, int]:
    """How many layers each parameter lies below the head, which has 0.

    As BEiT (Bao et al. 2022, arXiv 2106.08254) and timm have it: stem and embeddings are the lowest layer, each block
    is one, and the normalisation before the head goes with the head. Blocks are found in the model's tree of modules,
    so this holds for any model whose modules stand there in the order in which they are used.
    """
    head = model.matching([HEAD]) if model.head else set()
    parameters = dict(model.module.named_parameters())
    half = sum(parameter.numel() for parameter in parameters.values()) / 2
    layers: list[list[str]] = []
    norms: list[str] = []
    """Of normalisations since the last layer that has weights."""
    for unit in _units(model.module, "", half):
        names = [name for name in unit if name in parameters and name not in head]
        if all(parameters[name].ndim <= 1 for name in names):
            norms += names
            continue
        if layers:
            layers[-1] += norms
        layers.append(names if layers else [*norms, *names])
        norms = []
    found = dict.fromkeys([*head, *norms], 0)
    found |= {name: len(layers) - place for place, names in enumerate(layers) for name in names}
    return {name: found.get(name, len(layers)) for name in parameters}


def _units(module: nn.Module, prefix: str, half: float) -> Iterator[list[str]]:
    """The layers of a model in their order, each as the names of its parameters.

    Parameters that are in no layer, as ViT's class token, are left out.
    """
    for name, child in module.named_children():
        names = [f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()]
        if _is_opened(child, half):
            yield from _units(child, f"{prefix}{name}.", half)
        elif names:
            yield names


def _is_opened(module: nn.Module, half: float) -> bool:
    """Whether a module is several layers: a list of blocks, a long stack, a stage of like blocks, most of the model."""
    parts = _parts(module)
    has_blocks = any(_parts(part) for part in parts)
    if isinstance(module, CONTAINERS) and (has_blocks or len(parts) > PLAIN_STACK):
        return True
    if any(_are_blocks(each) for each in (parts, *(_parts(part) for part in parts if isinstance(part, CONTAINERS)))):
        return True
    return bool(parts) and sum(parameter.numel() for parameter in module.parameters()) > half


def _are_blocks(modules: Sequence[nn.Module]) -> bool:
    """Whether modules are the blocks of a stage: two or more of one class, whose parts have parts.

    The parts of a block, as the convolutions with their normalisations of an Inception block, have none.
    """
    alike = len(modules) > 1 and len({type(one) for one in modules}) == 1 and not isinstance(modules[0], CONTAINERS)
    return alike and all(any(_parts(part) for part in _parts(one)) for one in modules)


def _parts(module: nn.Module) -> list[nn.Module]:
    """Its children that have parameters."""
    return [child for child in module.children() if any(True for _ in child.parameters())]
