"""Makes of an architecture what the recipe says: the kind of its head, its dropout, its stochastic depth.

Names and shapes of all but the head stay, so that weights fit as they do the architecture itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn
from torchvision.ops import StochasticDepth

from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from launcher.recipe.schema_model import ModelConfig

Dropout = nn.modules.dropout._DropoutNd  # noqa: SLF001
"""Of any number of dimensions, for which torch has no public name."""
AUXILIARY_HEADS = ("aux", "AuxLogits")
"""How the heads that only training has begin (googlenet, inception_v3); these stay as they are."""


def shape(module: nn.Module, config: ModelConfig, head: Sequence[str]) -> None:
    """Change ``module`` as the recipe says.

    Args:
        module: with the architecture's own head for the classes.
        config: the recipe's ``model``.
        head: dotted names of its layers that are new for a new number of classes.

    Raises:
        UsageError: it does not have what is to be changed.
    """
    for _, change in _changes(config):
        change(module, config, head)


def is_shaped(config: ModelConfig) -> bool:
    """Whether the recipe changes anything in the architecture."""
    return bool(_changes(config))


def problems(module: nn.Module, config: ModelConfig, head: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The keys that :func:`shape` cannot follow, and why; changes what it can."""
    for key, change in _changes(config):
        try:
            change(module, config, head)
        except UsageError as error:
            yield key, str(error)


def _changes(config: ModelConfig) -> list[tuple[str, Callable[[nn.Module, ModelConfig, Sequence[str]], None]]]:
    """What the recipe asks for; dropout comes first, for the head may bring its own."""
    wanted = [
        (config.dropout is not None, "model.dropout", _set_dropout),
        (config.stochastic_depth is not None, "model.stochastic_depth", _set_stochastic_depth),
        (isinstance(config.head, str) and config.head != "auto", "model.head", _put_head),
    ]
    return [(key, change) for is_wanted, key, change in wanted if is_wanted]


def _set_dropout(module: nn.Module, config: ModelConfig, _: Sequence[str]) -> None:
    layers = list(module.modules())
    found: list[tuple[nn.Module, str]] = [(layer, "p") for layer in layers if isinstance(layer, Dropout)]
    found += [(layer, "drop_rate") for layer in layers if type(layer).__name__ == "_DenseLayer"]
    if not found:
        raise UsageError(
            f"found {config.dropout:g}, but {config.label} has no dropout; leave it out, or give model.head: "
            f"dropout({config.dropout:g}), which puts one before the head"
        )
    for layer, name in found:
        setattr(layer, name, config.dropout)


def _set_stochastic_depth(module: nn.Module, config: ModelConfig, _: Sequence[str]) -> None:
    layers = list(module.modules())
    found: list[tuple[nn.Module, str]] = [(layer, "p") for layer in layers if isinstance(layer, StochasticDepth)]
    found += [(layer, "drop_prob") for layer in layers if type(layer).__name__ == "DropPath"]
    most = max((getattr(layer, name) or 0.0 for layer, name in found), default=0.0)
    if not most:
        raise UsageError(
            f"found {config.stochastic_depth:g}, but {config.label} has no stochastic depth; leave it out (ConvNeXt, "
            "EfficientNet, Swin and MaxViT have it)"
        )
    for layer, name in found:  # the deepest block has the most, as it was built
        setattr(layer, name, (getattr(layer, name) or 0.0) / most * (config.stochastic_depth or 0.0))


def _put_head(module: nn.Module, config: ModelConfig, head: Sequence[str]) -> None:
    names = [name for name in head if not name.startswith(AUXILIARY_HEADS)]
    if len(names) != 1:
        raise UsageError(f"found {config.head}, but {config.label} has no head of a single layer; give auto")
    parent_name, _, name = names[0].rpartition(".")
    parent, last = module.get_submodule(parent_name), module.get_submodule(names[0])
    kind, number = re.fullmatch(r"(\w+?)(?:\((.+)\))?", str(config.head)).groups()  # type: ignore[union-attr]
    if not isinstance(last, nn.Linear) and (kind == "linear" or not _is_pointwise(last)):
        layer = f"{names[0]}, is a {type(last).__name__}"
        raise UsageError(f"found {config.head}, but the last layer of {config.label}, {layer}; give auto")
    if kind == "mlp":
        setattr(parent, name, _mlp(last, int(number)))
    elif kind == "dropout" and not _takes_dropout(parent, name, float(number)):
        setattr(parent, name, nn.Sequential(nn.Dropout(float(number)), last))


def _is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that does to each pixel what a linear layer does to an image (SqueezeNet)."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1


def _mlp(last: Any, num_hidden: int) -> nn.Sequential:
    """A hidden layer, and a last one of the kind that there was."""
    if isinstance(last, nn.Linear):
        return nn.Sequential(
            nn.Linear(last.in_features, num_hidden),
            nn.ReLU(),
            nn.Linear(num_hidden, last.out_features),
        )
    return nn.Sequential(
        nn.Conv2d(last.in_channels, num_hidden, 1), nn.ReLU(), nn.Conv2d(num_hidden, last.out_channels, 1)
    )


def _takes_dropout(parent: nn.Module, name: str, rate: float) -> bool:
    """Set the rate of a dropout that stands right before the last layer; False: there is none."""
    layers = list(parent.named_children()) if isinstance(parent, nn.Sequential) else []
    place = next((number for number, (own, _) in enumerate(layers) if own == name), 0)
    before = layers[place - 1][1] if place else None
    if not isinstance(before, Dropout):
        return False
    before.p = rate
    return True
