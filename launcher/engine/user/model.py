"""A model of the user's own: made, looked at for its head and for what it was trained with, tried with two images."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.errors import UsageError, did_you_mean
from launcher.recipe.user_code import as_in_run
from launcher.runs import user_code

if TYPE_CHECKING:
    from launcher.recipe.schema_model import ModelConfig

HEADS = ("fc", "classifier", "head", "heads")
"""What models call their last part."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224


@dataclass(frozen=True, kw_only=True)
class InputFacts:
    """What the weights of a model were trained with."""

    image_size: int = IMAGE_SIZE
    """Height and width in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of the colour channels, as fractions."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Of the colour channels, as fractions."""
    interpolation: str = "bilinear"
    """bilinear or bicubic."""


def build(config: ModelConfig, *, num_classes: int) -> nn.Module:
    """What ``model.factory`` returns.

    Raises:
        UsageError: it is no model that can be trained here.
    """
    assert config.factory  # noqa: S101
    function = user_code.load(config.factory)
    made = user_code.call("model.factory", function, config.factory_args, num_classes=num_classes)
    name = as_in_run(config.factory)
    if not isinstance(made, nn.Module):
        raise UsageError(f"{name} returned {_kind(made)}; it must return an nn.Module")
    parameters = dict(made.named_parameters())
    if not parameters:
        raise UsageError(f"{name} returned a {type(made).__name__} without parameters; there is nothing to learn")
    lazy = [key for key, one in parameters.items() if isinstance(one, nn.parameter.UninitializedParameter)]
    if lazy:
        raise UsageError(f"{name}: {lazy[0]} has no shape yet; run an image through the model before it is returned")
    others = [key for key, value in made.state_dict().items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UsageError(f"{name}: {others[0]} in its state_dict is no tensor, which a checkpoint cannot hold")
    return made


def head_of(module: nn.Module, config: ModelConfig, *, num_classes: int) -> tuple[str, ...]:
    """Dotted names of the layers that are new for a new number of classes.

    Raises:
        UsageError: the recipe names one that the model does not have.
    """
    modules = dict(module.named_modules())
    if isinstance(config.head, list):
        unknown = [name for name in config.head if name not in modules or not name]
        if unknown:
            top = ", ".join(name for name in modules if name and "." not in name)
            hint = did_you_mean(unknown[0], modules)
            raise UsageError(f"found {unknown[0]!r}, which is no layer of the model; {hint} its parts: {top}")
        return tuple(config.head)
    said = _config_of(module).get("classifier") or ()
    named = [said] if isinstance(said, str) else list(said)
    for name in [*named, *HEADS]:
        if name in modules and any(True for _ in modules[name].parameters()):
            inner = _last(modules[name], num_classes)
            return (f"{name}.{inner}".rstrip(".") if inner is not None else name,)
    last = _last(module, num_classes)
    if last is not None:
        return (last,)
    leaves = [name for name, one in modules.items() if name and any(True for _ in one.parameters(recurse=False))]
    return (leaves[-1],) if leaves else ()


def _last(module: nn.Module, num_classes: int) -> str | None:
    """The last layer within a module that has an output for each class; empty: the module itself."""
    found = None
    for name, layer in module.named_modules():
        if num_classes in (getattr(layer, "out_features", None), getattr(layer, "out_channels", None)):
            found = name
    return found


def facts_of(module: nn.Module) -> InputFacts:
    """What a model says it was trained with, as timm's do; ImageNet's usual where it says nothing."""
    found = _config_of(module)
    facts: dict[str, Any] = {}
    if size := found.get("input_size"):
        facts["image_size"] = int(size[-1])
    facts |= {name: tuple(map(float, found[name])) for name in ("mean", "std") if found.get(name)}
    if found.get("interpolation") in ("bilinear", "bicubic"):
        facts["interpolation"] = found["interpolation"]
    return InputFacts(**facts)


def facts(config: ModelConfig, *, num_classes: int) -> InputFacts:
    """The same, of a model that is made for it; once a process."""
    return _facts(config.factory or "", json.dumps(config.factory_args, sort_keys=True), num_classes)


@functools.cache
def _facts(factory: str, args: str, num_classes: int) -> InputFacts:
    from launcher.recipe.schema_model import ModelConfig

    with torch.random.fork_rng(devices=[]):
        config = ModelConfig(factory=factory, factory_args=json.loads(args))
        return facts_of(build(config, num_classes=num_classes))


def _config_of(module: nn.Module) -> dict[str, Any]:
    for part in module.modules():
        for name in ("pretrained_cfg", "default_cfg"):
            found: Any = getattr(part, name, None)
            if isinstance(found, dict) and found:
                return found
            if hasattr(found, "to_dict"):
                return dict(found.to_dict())
    return {}


@torch.no_grad()
def try_forward(
    module: nn.Module, config: ModelConfig, *, num_classes: int, image_size: int, channels: int = 3
) -> None:
    """Run two images through the model, in evaluation and in training.

    Raises:
        UsageError: it does not return logits for each class.
    """
    state = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        for mode in (False, True):
            module.train(mode)
            images = torch.rand(2, channels, image_size, image_size)
            check_logits(module(images), config, num=2, num_classes=num_classes)
    module.load_state_dict(state)  # BatchNorm has seen them


def check_logits(found: Any, config: ModelConfig, *, num: int, num_classes: int) -> None:
    """Check what a model returns for ``num`` images.

    Raises:
        UsageError: it is something else.
    """
    name, wanted = as_in_run(config.factory or ""), f"a float tensor of {num} x {num_classes} logits"
    if not isinstance(found, torch.Tensor):
        raise UsageError(f"the model of {name} returned {_kind(found)} for {num} images; it must return {wanted}")
    if found.shape != (num, num_classes) or not found.is_floating_point():
        shape = " x ".join(map(str, found.shape)) or "no dimensions"
        kind = str(found.dtype).removeprefix("torch.")
        raise UsageError(f"the model of {name} returned {shape} of {kind} for {num} images; it must return {wanted}")


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
