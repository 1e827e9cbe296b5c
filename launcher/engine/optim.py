"""The optimizer with a learning rate per group of layers, and the rate's course over training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.schedule import lr_factor

if TYPE_CHECKING:
    from launcher.engine.model import FineTunedModel
    from launcher.recipe import OptimConfig, Recipe


def group_parameters(model: FineTunedModel, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups, the first pattern that matches a parameter counts; what none matches learns at ``optim.lr``.

    Frozen parameters are in them too: without a gradient an optimizer leaves them alone, and one that is unfrozen
    later needs no new optimizer.

    Returns:
        ``{name, params, peak_lr}`` each, none of them empty.
    """
    left = dict(model.module.named_parameters())
    groups = []
    for pattern, lr in config.groups.items():
        matched = model.matching([pattern])
        params = [left.pop(name) for name in list(left) if name in matched]
        groups.append({"name": pattern, "params": params, "peak_lr": lr})
    groups.append({"name": "rest", "params": list(left.values()), "peak_lr": config.lr})
    return [group for group in groups if group["params"]]


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
