"""The optimizer with a learning rate per group of layers, and the rate's course over training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.optimizing.groups import REST, deal_names, group_parameters
from launcher.engine.optimizing.kinds import OPTIMIZERS
from launcher.engine.optimizing.rates import lr_factor
from launcher.recipe import load as recipes
from launcher.recipe import phases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from launcher.engine.model import FineTunedModel
    from launcher.recipe.schema import OptimConfig, Recipe


def build_optimizer(model: FineTunedModel, config: OptimConfig) -> torch.optim.Optimizer:
    """What ``optim.name`` names; learning rates are set by :func:`set_lr` before each step."""
    return OPTIMIZERS[config.name].build(group_parameters(model, config), config)


def regroup(optimizer: torch.optim.Optimizer, model: FineTunedModel, config: OptimConfig) -> None:
    """Give an optimizer the groups and settings of ``config``, where they differ; what it knows of weights stays."""
    new = build_optimizer(model, config)
    if [_settings(group) for group in new.param_groups] == [_settings(group) for group in optimizer.param_groups]:
        return
    optimizer.param_groups[:] = new.param_groups
    optimizer.defaults = new.defaults
    for parameter in _all_parameters(optimizer, lambda group: not group.get("momentum")):
        optimizer.state.get(parameter, {}).pop("momentum_buffer", None)
    _complete_momentum(optimizer)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What a group was made with."""
    return {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}


def forget_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Let go of what is known of weights that do not learn."""
    for parameter in _all_parameters(optimizer):
        if not parameter.requires_grad:
            optimizer.state.pop(parameter, None)


def _all_parameters(
    optimizer: torch.optim.Optimizer, of: Callable[[dict[str, Any]], bool] = lambda _: True
) -> Iterator[torch.Tensor]:
    """The parameters of some groups."""
    return (parameter for group in optimizer.param_groups if of(group) for parameter in group["params"])


def _complete_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give RMSprop the momentum that it makes with the rest of a weight's state, or never."""
    if isinstance(optimizer, torch.optim.RMSprop):
        for parameter in _all_parameters(optimizer, lambda group: bool(group["momentum"])):
            if state := optimizer.state.get(parameter):
                state.setdefault("momentum_buffer", torch.zeros_like(parameter))


def step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, flag: torch.Tensor) -> None:
    """Take a step, unless ``flag`` (on the device) is not 0.

    Fused optimizers take the flag, and nobody waits for the device. The others have no such kernel in torch 2.14:
    without loss scaling, which waits itself, the flag is looked at.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # What GradScaler hands to fused optimizers; where it is on it does so itself, of the gradients it has seen.
        optimizer.found_inf = flag  # type: ignore[attr-defined]
    elif bool(flag):
        return
    scaler.step(optimizer)


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
            if name in states and not (isinstance(optimizer, torch.optim.SGD) and group["momentum"] == 0):
                own["state"][place] = states[name]
    optimizer.load_state_dict(own)
    _follow_layout(optimizer)
    _complete_momentum(optimizer)


def _follow_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give momentum and moments the memory layout of their weights: fused kernels take both as they lie in memory.

    A checkpoint of a run with ``channels_last`` has another one than a run without.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if is_alike and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def other_groups(model: FineTunedModel, recipe: Recipe, state: dict[str, Any], saved: dict[str, Any]) -> dict[str, int]:
    """How many parameters learn otherwise than when a checkpoint was made though its recipe's groups are this one's.

    A version of launch may group them in another way than the one before it. What never learns again is passed over.

    Args:
        model: whose parameters they are.
        recipe: to go on with.
        state: the checkpoint's ``state.json``.
        saved: its optimizer's ``state_dict()``.

    Returns:
        ``rate`` and ``weight_decay``, each with how many tensors have another one; empty: there is none, or the recipe
        itself may be the reason.
    """
    try:
        before = recipes.from_recorded(state["recipe"])
    except (KeyError, ValueError, TypeError):  # of another version, which says no more of its groups
        return {}
    # As text: the order of the patterns counts, which dicts are equal without.
    meant = {f"{(one.optim, one.train.phases, one.model.factory, one.model.factory_args)}" for one in (before, recipe)}
    if len(meant) > 1:
        return {}
    then = _learned(zip(_saved_names(model, saved["param_groups"]), saved["param_groups"], strict=True))
    epoch = state["epoch"]
    # At the end of an epoch the groups are still those of its phase, though the next one may be in another.
    possible = {epoch, max(epoch - 1, 0)} if state["offset"] == 0 else {epoch}
    ahead = {epoch, *(one.start for one in phases.phases(recipe) if one.start > epoch)}
    idle = set.intersection(*(model.frozen_parameters(each) for each in ahead))
    found = []
    for each in possible:
        groups = build_optimizer(model, phases.phase_at(recipe, each).optim).param_groups
        now = _learned((group["names"], group) for group in groups)
        pairs = [(then[name], now[name]) for name in then.keys() & now.keys() - idle]
        found.append(
            {key: sum(not math.isclose(old[key], new[key]) for old, new in pairs) for key in ("rate", "weight_decay")}
        )
    least = min(found, key=lambda counts: sum(counts.values()))
    return least if any(least.values()) else {}


def _learned(groups: Iterable[tuple[list[str], dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """The highest rate and the decay of each parameter, by its name."""
    return {
        name: {"rate": group["peak_lr"], "weight_decay": group["weight_decay"]}
        for names, group in groups
        for name in names
    }


def _saved_names(model: FineTunedModel, groups: list[dict[str, Any]]) -> list[list[str]]:
    """The names of each group's parameters; groups that an earlier version saved have only their pattern."""
    if all("names" in group for group in groups):
        return [group["names"] for group in groups]
    return [names for _, names in deal_names(model, [group["name"] for group in groups if group["name"] != REST])]


def prepare_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD a momentum of nothing for what learns and has none yet, as its first step would.

    Fused SGD (torch 2.14) takes a group only if all of its parameters have one or none has, so it fails at the first
    step after some were unfrozen.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            # What does not learn gets none, not even an empty one: a resumed run would have another state then.
            if parameter.requires_grad and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def lr_scale(config: OptimConfig, global_batch_size: int) -> float:
    """By what the recipe's rates are multiplied at this global batch (``optim.lr_batch_size``)."""
    if config.lr_batch_size is None:
        return 1.0
    ratio = global_batch_size / config.lr_batch_size
    return math.sqrt(ratio) if OPTIMIZERS[config.name].adaptive else ratio


def set_lr(optimizer: torch.optim.Optimizer, recipe: Recipe, progress: float, global_batch_size: int) -> float:
    """Set every group's rate for the step around ``progress`` (epochs done); return the highest."""
    phase = phases.phase_at(recipe, int(progress))
    begin, epochs = phase.course
    factor = lr_scale(phase.optim, global_batch_size) * lr_factor(progress - begin, phase.optim, epochs=epochs)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(max(group["lr"] for group in optimizer.param_groups))


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """``lr``, the highest rate; and, where there are several groups, each one's as ``lr/NAME``."""
    found = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
    return {"lr": max(found.values()), **(found if len(found) > 1 else {})}
