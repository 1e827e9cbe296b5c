"""The layers of a model by name: which are its head, and which a recipe's pattern selects."""

from __future__ import annotations

import functools
import inspect
import typing
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from launcher.errors import UsageError, did_you_mean
from launcher.system import lazy_meta

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

HEAD = "head"
"""Pattern of the layers that are new for a new number of classes."""
BACKBONE = "backbone"
"""Pattern of all layers but the head."""
ALL = "*"
"""Pattern of all layers."""

DESCRIBED_CLASSES = 1000
"""ImageNet's: the number of classes for which :func:`describe_layers` counts parameters."""


BatchNorm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001
"""Of any number of dimensions, for which torch has no public name."""


def batch_norms(module: nn.Module) -> list[BatchNorm]:
    """The BatchNorm layers of a model."""
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm)]


OF_THEIR_INPUT = (nn.Hardtanh, nn.Hardswish, nn.SiLU)
"""Activations (ReLU6 is a Hardtanh) whose derivative is computed from their input."""


def keep_inputs(module: nn.Module) -> None:
    """Have such activations not work in place: autograd would copy their input first, which takes time for the same."""
    for layer in module.modules():
        if isinstance(layer, OF_THEIR_INPUT):
            layer.inplace = False


def prefers_channels_last(module: nn.Module) -> bool:
    """Whether a step on a CPU is faster with channels last, by what was measured (tests.bench.layouts).

    It is where there are convolutions of 1 x 1 pixels or of single channels. VGG and AlexNet, which have none, are
    slower with it; vision transformers have one convolution, and do not care.
    """
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return any(layer.kernel_size == (1, 1) or 1 < layer.groups == layer.in_channels for layer in convolutions)


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A part of a model that a pattern can name."""

    name: str
    """Dotted name from the model down."""
    depth: int
    """0 for the model's own parts, 1 for their parts, and so on."""
    kind: str
    """Class name; Parameter for one that stands beside modules, as ViT's class_token."""
    num_params: int
    """Parameters in it and beneath it."""
    is_head: bool
    """Whether all of them belong to the head."""


INITIALISERS = (torch.Tensor.normal_, torch.Tensor.uniform_)
"""Nothing to do without values. torch's own for the meta device import its symbolic mathematics: a second."""


class _EmptyOnMeta(TorchFunctionMode):
    """Makes uninitialised tensors, which are all big parameters, on the meta device.

    Unlike ``torch.device("meta")`` it lets everything else be computed: RegNet reads its widths from real tensors.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        if func in INITIALISERS or getattr(func, "__module__", None) == nn.init.__name__:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def on_meta() -> TorchFunctionMode:
    """Where models are built without memory for their parameters, as :func:`build_meta` does."""
    return _EmptyOnMeta()


def build_meta(arch: str, num_classes: int) -> nn.Module:
    """A torchvision model with shapes and no values: all parameters and buffers are on the meta device.

    Takes a fraction of a second and no memory for any model, and leaves the random state as it was.
    """
    builder = models.get_model_builder(arch)
    options: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    # Inception and GoogLeNet warn that their initialisation is slow unless told to leave it.
    if "init_weights" in inspect.signature(typing.get_type_hints(builder)["return"]).parameters:
        options["init_weights"] = False
    with lazy_meta.shapes_only(), torch.random.fork_rng(devices=[]), _EmptyOnMeta():
        model: nn.Module = builder(**options)
        return model.to("meta")


@functools.cache
def head_modules(arch: str) -> tuple[str, ...]:
    """Dotted names of the layers whose parameters change shape with the number of classes, in the model's order.

    Most models have one; Inception and GoogLeNet have auxiliary heads besides, which they drop when they are built
    without (``aux_logits=False``).
    """
    one, other = (dict(build_meta(arch, num_classes).named_parameters()) for num_classes in (2, 3))
    changed = (_parent(name) for name, parameter in one.items() if parameter.shape != other[name].shape)
    return tuple(dict.fromkeys(changed))


def match_parameters(model: nn.Module, patterns: Iterable[str], head: Collection[str]) -> set[str]:
    """Names of the parameters that patterns of ``model.freeze``, ``model.unfreeze`` or ``optim.groups`` select.

    Args:
        model: the model itself, not a wrapper around it.
        patterns: each is ``head``; ``backbone``, all but the head; ``*``, all; or a glob on dotted names. A name
            selects what is beneath it too: ``layer1`` selects ``layer1.0.conv1``, and ``features.[0-4]`` five blocks
            whole. The names are those of modules, and of parameters, since ViT's ``class_token`` is in no smaller
            module.
        head: the head's names, from :func:`head_modules`; those that the model lacks do not count.

    Raises:
        UsageError: a pattern selects no parameter; names the nearest layers and the model's own parts.
    """
    paths = {name: _paths(name) for name, _ in model.named_parameters()}
    in_head = {name for name, names in paths.items() if not set(names).isdisjoint(head)}
    matched: set[str] = set()
    for pattern in patterns:
        if pattern == HEAD:
            found = in_head
        elif pattern == BACKBONE:
            found = paths.keys() - in_head
        else:
            found = {name for name, names in paths.items() if any(fnmatchcase(part, pattern) for part in names)}
        if not found:
            raise UsageError(_no_match(model, pattern))
        matched |= found
    return matched


def describe_layers(arch: str) -> list[LayerRow]:
    """What the patterns of a recipe can name: the model's parts, and their parts.

    Where one part holds more than half of all parameters its own parts are listed too, as ViT's encoder layers.
    """
    model = build_meta(arch, DESCRIBED_CLASSES)
    in_head = match_parameters(model, [HEAD], head_modules(arch))
    counts: Counter[str] = Counter()
    head_counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        for path in _paths(name):
            counts[path] += parameter.numel()
            head_counts[path] += parameter.numel() if name in in_head else 0
    modules = dict(model.named_modules())
    half = sum(parameter.numel() for parameter in model.parameters()) // 2
    opened = {"", *(path for path in counts if "." not in path or counts[path] > half)}
    # A layer that has no parts, such as a convolution, is not opened into its weight and bias.
    opened &= {_parent(path) for path in counts if path in modules}
    return [
        LayerRow(
            name=path,
            depth=path.count("."),
            kind=type(modules[path]).__name__ if path in modules else "Parameter",
            num_params=counts[path],
            is_head=head_counts[path] == counts[path],
        )
        for path in counts
        if _parent(path) in opened
    ]


def _paths(name: str) -> list[str]:
    """``a.b.weight`` -> ``a``, ``a.b``, ``a.b.weight``: the names by which a parameter can be selected."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _no_match(model: nn.Module, pattern: str) -> str:
    kind = type(model).__name__
    if any(fnmatchcase(name, pattern) for name, _ in model.named_modules()):
        problem = f"found {pattern!r}, which is only layers of {kind} without parameters;"
    else:
        problem = f"found {pattern!r}, which matches no layer of {kind};"
    names = dict.fromkeys(path for name, _ in model.named_parameters() for path in _paths(name))
    hint = did_you_mean(pattern, [HEAD, BACKBONE, *names])
    top = ", ".join(name for name in names if "." not in name)
    valid = f"valid: {HEAD}, {BACKBONE}, {ALL}, and names or globs of {top} or of what is beneath them"
    return " ".join(filter(None, [problem, hint, valid]))
