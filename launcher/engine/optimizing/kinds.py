"""The optimizers: one row each, which all read that make one or scale its rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launcher.engine.optimizing.muon import Groups, MuonAndAdamW

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.recipe.schema import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An optimizer of torch's.

    Where torch has a fused kernel it is taken: it is the fastest, on a CPU too, and can leave a step out by a flag on
    the device. The others are torch's for many tensors at once (foreach) on a GPU, and one after the other on a CPU,
    as torch itself chooses.
    """

    build: Callable[[Groups, OptimConfig], torch.optim.Optimizer]
    """Makes one of parameter groups."""
    adaptive: bool = True
    """Whether it divides by the gradient's size: its rates go with the square root of the global batch (Malladi et al.
    2022, arXiv 2205.10287), those of SGD in proportion to it (Goyal et al. 2017, arXiv 1706.02677)."""


def _sgd(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    momentum, decay = config.momentum, config.weight_decay
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, weight_decay=decay, fused=True
    )


def _adam(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _adamw(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _nadam(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.NAdam(groups, lr=config.lr, weight_decay=config.weight_decay, decoupled_weight_decay=True)


def _radam(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.RAdam(groups, lr=config.lr, weight_decay=config.weight_decay, decoupled_weight_decay=True)


def _rmsprop(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def _adafactor(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=config.lr, weight_decay=config.weight_decay)


OPTIMIZERS: dict[str, Kind] = {
    "sgd": Kind(build=_sgd, adaptive=False),
    "adam": Kind(build=_adam),
    "adamw": Kind(build=_adamw),
    "nadam": Kind(build=_nadam),
    "radam": Kind(build=_radam),
    "rmsprop": Kind(build=_rmsprop),
    "adafactor": Kind(build=_adafactor),
    "muon": Kind(build=MuonAndAdamW),
}
"""By the name that ``optim.name`` gives."""
