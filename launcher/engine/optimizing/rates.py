"""How learning rates go over training: pure functions of the position, one row each in ``SCHEDULES``.

Nothing of them is in a checkpoint. With the same numbers they are those of torch.optim.lr_scheduler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.recipe.schema import OptimConfig

ONE_CYCLE_RISE = 0.3
"""Fraction of training over which one_cycle rises where the recipe names no warm-up."""
ONE_CYCLE_START = 1 / 25
"""Fraction of the peak that one_cycle begins with."""


@dataclass(frozen=True, kw_only=True)
class _Position:
    """Where in training a rate is asked for, after warm-up."""

    progress: float
    """Epochs done, warm-up included."""
    rest: float
    """How much of what follows warm-up is done, from 0 to 1."""
    epochs: int
    """Length of training."""


def _cosine(at: _Position, config: OptimConfig) -> float:
    """Half cosine of SGDR (Loshchilov & Hutter 2017, without restarts)."""
    return _from_one_to(config.end_factor, 0.5 * (1.0 + math.cos(math.pi * at.rest)))


def _linear(at: _Position, config: OptimConfig) -> float:
    return _from_one_to(config.end_factor, 1.0 - at.rest)


def _polynomial(at: _Position, config: OptimConfig) -> float:
    return _from_one_to(config.end_factor, (1.0 - at.rest) ** config.power)


def _constant(_: _Position, __: OptimConfig) -> float:
    return 1.0


def _step(at: _Position, config: OptimConfig) -> float:
    """Drops at epochs that are counted from the beginning of training, as people name them."""
    if isinstance(config.step_epochs, list):
        drops = sum(at.progress >= epoch for epoch in config.step_epochs)
    else:
        every = at.epochs / 3 if config.step_epochs == "auto" else config.step_epochs
        drops = math.floor(at.progress / every)
    return float(config.step_factor**drops)


def _restarts(at: _Position, config: OptimConfig) -> float:
    """SGDR: half cosines, each ``cycle_growth`` times as long as the one before; the last ends with training."""
    growth, left = config.cycle_growth, at.rest
    length = 1.0 / sum(growth**number for number in range(config.cycles))
    for _ in range(config.cycles - 1):
        if left < length:
            break
        left, length = left - length, length * growth
    return _from_one_to(config.end_factor, 0.5 * (1.0 + math.cos(math.pi * min(1.0, left / length))))


SCHEDULES: dict[str, Callable[[_Position, OptimConfig], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "step": _step,
    "one_cycle": _cosine,
    "polynomial": _polynomial,
    "constant": _constant,
    "cosine_restarts": _restarts,
}
"""By the name that ``optim.schedule`` gives: the fraction of the peak rate after warm-up."""


def lr_factor(progress: float, config: OptimConfig, *, epochs: int) -> float:
    """Fraction of the peak learning rate after ``progress`` epochs.

    Warm-up, a line from near zero, then what ``optim.schedule`` names. A warm-up that is longer than training is cut
    off by its end. one_cycle (Smith & Topin 2018) rises by a half cosine from 1/25 of the peak; it leaves momentum as
    it is.

    Args:
        progress: epochs done, with the fraction of the present one; the middle of a step is meant by its end.
        config: the recipe's.
        epochs: length of training.
    """
    is_cycle = config.schedule == "one_cycle"
    warmup = config.warmup_epochs or (ONE_CYCLE_RISE * epochs if is_cycle else 0.0)
    if progress < warmup:
        done = progress / warmup
        return ONE_CYCLE_START + (1.0 - ONE_CYCLE_START) * 0.5 * (1.0 - math.cos(math.pi * done)) if is_cycle else done
    rest = min(1.0, (progress - warmup) / (epochs - warmup)) if warmup < epochs else 0.0
    return SCHEDULES[config.schedule](_Position(progress=progress, rest=rest, epochs=epochs), config)


def _from_one_to(end: float, factor: float) -> float:
    """What goes from 1 to 0, made to end at ``end``."""
    return end + (1.0 - end) * factor
