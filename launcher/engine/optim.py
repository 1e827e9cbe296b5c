"""The optimizer with a learning rate per group of layers, and the rate's course over training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.schedule import lr_factor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from launcher.engine.model import FineTunedModel
    from launcher.recipe.schema import OptimConfig, Recipe

REST = "rest"
"""Name of the group of what no pattern matches."""


def group_parameters(model: FineTunedModel, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups, the first pattern that matches a parameter counts; what none matches learns at ``optim.lr``.

    Frozen parameters are in them too: without a gradient an optimizer leaves them alone, and one that is unfrozen
    later needs no new optimizer.

    Returns:
        ``{name, names, params, peak_lr}`` each, none of them empty; ``names`` are those of its parameters.
    """
    parameters = dict(model.module.named_parameters())
    return [
        {
            "name": pattern,
            "names": names,
            "params": [parameters[name] for name in names],
            "peak_lr": config.groups.get(pattern, config.lr),
        }
        for pattern, names in _deal_names(model, config.groups)
    ]


def _deal_names(model: FineTunedModel, patterns: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Each pattern with the names of the parameters that it is the first to match; what is left is ``rest``."""
    left = [name for name, _ in model.module.named_parameters()]
    dealt = []
    for pattern in patterns:
        matched = model.matching([pattern])
        dealt.append((pattern, [name for name in left if name in matched]))
        left = [name for name in left if name not in matched]
    return [(pattern, names) for pattern, names in [*dealt, (REST, left)] if names]


def build_optimizer(model: FineTunedModel, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; learning rates are set by :func:`set_lr` before each step.

    Fused: it is the fastest, on a CPU too, and can leave a step out by a flag on the device (``found_inf``).
    """
    groups = group_parameters(model, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    nesterov = config.momentum > 0
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its ``state_dict()`` without the rates of the moment: they follow from the recipe and the position."""
    found: dict[str, Any] = optimizer.state_dict()
    return found | {"param_groups": [group | {"lr": group["peak_lr"]} for group in found["param_groups"]]}


def restore(optimizer: torch.optim.Optimizer, model: FineTunedModel, saved: dict[str, Any]) -> None:
    """Give each parameter the state (momentum, moments, steps) that it had when ``saved`` was made.

    Rates and all other settings stay those that ``optimizer`` was built with, and so do its groups: parameters are
    matched by name, whichever group they were in then.

    Args:
        optimizer: of the same kind.
        model: whose parameters it has.
        saved: its ``state_dict()`` of then.
    """
    old_names = [name for names in _saved_names(model, saved["param_groups"]) for name in names]
    old_places = [place for group in saved["param_groups"] for place in group["params"]]
    states = {
        name: saved["state"][place]
        for name, place in zip(old_names, old_places, strict=True)
        if place in saved["state"]
    }
    own = optimizer.state_dict() | {"state": {}}
    for group in own["param_groups"]:
        for name, place in zip(group["names"], group["params"], strict=True):
            # A momentum that is not used now would be of long ago by the time it is used again.
            if name in states and group.get("momentum") != 0:
                own["state"][place] = states[name]
    optimizer.load_state_dict(own)
    _follow_layout(optimizer)


def _follow_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give momentum and moments the memory layout of their weights: fused kernels take both as they lie in memory.

    A checkpoint of a run with ``channels_last`` has another one than a run without.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if is_alike and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _saved_names(model: FineTunedModel, groups: list[dict[str, Any]]) -> list[list[str]]:
    """The names of each group's parameters; groups that an earlier version saved have only their pattern."""
    if all("names" in group for group in groups):
        return [group["names"] for group in groups]
    return [names for _, names in _deal_names(model, [group["name"] for group in groups if group["name"] != REST])]


def prepare_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD a momentum of nothing for what learns and has none yet, as its first step would.

    Fused SGD (torch 2.14) takes a group only if all of its parameters have one or none has, so it fails at the first
    step after some were unfrozen.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            state = optimizer.state[parameter]
            if parameter.requires_grad and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def lr_scale(config: OptimConfig, global_batch_size: int) -> float:
    """By what the recipe's rates are multiplied at this global batch (``optim.lr_batch_size``)."""
    if config.lr_batch_size is None:
        return 1.0
    ratio = global_batch_size / config.lr_batch_size
    return ratio if config.name == "sgd" else math.sqrt(ratio)


def set_lr(optimizer: torch.optim.Optimizer, recipe: Recipe, progress: float, global_batch_size: int) -> float:
    """Set every group's rate for the step around ``progress`` (epochs done); return the highest."""
    factor = lr_scale(recipe.optim, global_batch_size) * lr_factor(
        progress,
        schedule=recipe.optim.schedule,
        warmup_epochs=recipe.optim.warmup_epochs,
        epochs=recipe.train.epochs,
    )
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(max(group["lr"] for group in optimizer.param_groups))
