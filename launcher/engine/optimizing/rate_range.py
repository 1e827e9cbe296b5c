"""The learning rate range test (Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186).

A training begins, and its rate grows by the same factor in each step. Where the loss falls fastest the rate is good;
where it rises the rate is too high. It is the very step of training on the recipe's own model, images and global batch,
in one process; what was trained is thrown away.
"""

from __future__ import annotations

import itertools
import math
import operator
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch.distributed as dist

from launcher.engine import optim
from launcher.engine.distributed import Ranks, init_process_group
from launcher.engine.loading.handover import end_loaders
from launcher.engine.metrics import means
from launcher.engine.optimizing.groups import REST, deal_names
from launcher.engine.optimizing.kinds import OPTIMIZERS
from launcher.engine.setup import build_parts
from launcher.engine.state import TrainingState
from launcher.engine.train_step import TrainStep
from launcher.recipe import phases
from launcher.system import phases as phases_told

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from launcher.engine.device import Device
    from launcher.engine.schedule import Batching
    from launcher.engine.setup import Parts
    from launcher.runs.run_dir import RunDir

RANGES = {False: (1e-4, 10.0), True: (1e-6, 1.0)}
"""Rates from which and to which it goes, by whether the optimizer is adaptive."""
MOST_STEPS, FEWEST_STEPS = 100, 30
SECONDS = 40.0
"""Where steps are slow there are fewer of them, each at a rate that is further from the one before: it takes about so
long."""
TOO_HIGH = 3.0
"""Stop where the loss is so many times what it was at its best."""
SMOOTHING = 0.03
"""Width of the bell curve that losses are smoothed by, as a fraction of all steps."""

NOISE = 5.0
"""A fall is one if it is more than so many standard deviations of the smoothed loss: chance makes such a one in fewer
than one of ten curves that do not fall at all."""
NORMAL_MEDIAN = 0.6745
"""Of the size of what has a standard deviation of 1."""


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """What was found."""

    rates: list[float]
    """What `optim.lr` would be for each step."""
    losses: list[float]
    """Its loss."""
    smooth: list[float]
    """The same, smoothed."""
    suggestion: float | None
    """The rate where the smoothed loss falls fastest; None: it never falls by more than it varies."""
    overrides: list[str]
    """What to write for that rate."""


def measure(
    run: RunDir, device: Device, batching: Batching, *, bounds: tuple[float, float] | None, num_steps: int | None
) -> RangeTest:
    """Take steps at ever higher rates.

    Args:
        run: its recipe says what is trained; nothing is written there.
        device: where.
        batching: of one rank.
        bounds: the lowest and the highest rate; None: by the optimizer.
        num_steps: how many; None: as many as there is time for.
    """
    device.activate()
    init_process_group(device, Ranks())
    try:
        parts = build_parts(run, Ranks(), device, batching=batching)
        config = phases.phase_at(parts.recipe, 0).optim
        bounds = bounds or RANGES[OPTIMIZERS[config.name].adaptive]
        rates, losses = _sweep(parts, bounds, num_steps)
        smooth = smoothed(losses)
        place = steepest(rates, losses, smooth)
        suggestion = None if place is None else round_to(rates[place])
        overrides = _overrides(parts, suggestion) if suggestion else []
        return RangeTest(rates=rates, losses=losses, smooth=smooth, suggestion=suggestion, overrides=overrides)
    finally:
        end_loaders()
        dist.destroy_process_group()


def _sweep(parts: Parts, bounds: tuple[float, float], num_steps: int | None) -> tuple[list[float], list[float]]:
    """The rate and the loss of each step, up to where the loss is far too high."""
    parts.fit_loading()
    parts.enter(0)
    parts.wrap()
    optim.prepare_momentum(parts.optimizer)
    parts.model.train()
    low, high = bounds
    losses = _losses(parts)
    next(losses)
    losses.send(low)  # which may take longer than any other: libraries choose their algorithms
    began, rate = time.monotonic(), low
    rates: list[float] = []
    found: list[float] = []
    with phases_told.during("trying rates, step") as show:
        while rate <= high * (1 + 1e-9):
            loss = losses.send(rate)
            if not math.isfinite(loss):
                break
            rates.append(rate)
            found.append(loss)
            smooth = smoothed(found)
            if smooth[-1] > TOO_HIGH * min(smooth):
                break
            left = (num_steps or MOST_STEPS) - len(rates)
            if num_steps is None:
                each = (time.monotonic() - began) / len(rates)
                left = min(left, max(FEWEST_STEPS - len(rates), int(SECONDS / each) - len(rates)))
            show(len(rates), len(rates) + max(0, left))
            rate = rate * (high / rate) ** (1 / left) if left > 0 else math.inf
    losses.close()
    return rates, found


def _losses(parts: Parts) -> Generator[float, float, None]:
    """A generator that takes a step at each rate that is sent, and gives its mean loss."""
    state = TrainingState(parts)
    train_step = TrainStep(parts, state)
    config = phases.phase_at(parts.recipe, 0).optim
    scale = optim.lr_scale(config, parts.schedule.batching.global_batch_size)
    endless = 1 << 30
    steps, loaded = (parts.schedule.steps(0, epoch=0, offset=0, end_epoch=endless) for _ in range(2))
    batches = iter(parts.loader(parts.train_set, itertools.chain.from_iterable(step.positions for step in loaded)))
    loss = math.nan
    for step in steps:
        rate = yield loss
        for group in parts.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate / config.lr * scale
        train_step.run(step, batches)
        state.step += 1
        loss = means(state.window_totals.reduce())["loss"]
        state.window_totals.reset()


def smoothed(losses: Sequence[float]) -> list[float]:
    """Each loss with its neighbours, by a bell curve: unlike a moving average it does not lag behind."""
    width, num, found = _width(len(losses)), len(losses), []
    beside = [math.exp(-((distance / width) ** 2) / 2) for distance in range(num)]
    bell = [*reversed(beside), *beside[1:]]  # by distance, from -num + 1 on
    for place in range(num):
        weights = bell[num - 1 - place : 2 * num - 1 - place]
        found.append(sum(map(operator.mul, weights, losses)) / sum(weights))
    return found


def noise_of_smoothed(losses: Sequence[float]) -> float:
    """Standard deviation of a smoothed loss by chance: from the median step from a loss to the next.

    The median does not care for where the loss falls, nor for where it leaps up at the end.
    """
    steps = [abs(other - one) for one, other in pairwise(losses)]
    of_each = statistics.median(steps) / NORMAL_MEDIAN / math.sqrt(2)
    return of_each / math.sqrt(2 * math.sqrt(math.pi) * _width(len(losses)))  # as many are averaged


def _width(num: int) -> float:
    return max(1.0, SMOOTHING * num)


def steepest(rates: Sequence[float], losses: Sequence[float], smooth: Sequence[float]) -> int | None:
    """Where the smoothed loss falls fastest, from where it falls by more than it varies to where it is lowest.

    None: it does not fall by more than it varies.
    """
    lowest = min(range(len(smooth)), key=smooth.__getitem__, default=0)
    if lowest < 2:  # noqa: PLR2004  a slope needs a point on either side
        return None
    noise, top = noise_of_smoothed(losses), max(smooth[:lowest])
    if top - smooth[lowest] <= NOISE * noise:
        return None
    # Before it begins to fall for good, only chance goes up and down.
    begin = max(place for place in range(lowest) if top - smooth[place] <= NOISE / 2 * noise)

    def slope(place: int) -> float:
        return (smooth[place + 1] - smooth[place - 1]) / math.log(rates[place + 1] / rates[place - 1])

    return min(range(max(1, begin), lowest), key=slope)


def round_to(rate: float, digits: int = 2) -> float:
    """A rate of so many digits, as people write one."""
    return float(f"{rate:.{digits - 1}e}")


def _overrides(parts: Parts, rate: float) -> list[str]:
    """What makes ``rate`` the one of `optim.lr`, and those of the groups what they are to it."""
    config = phases.phase_at(parts.recipe, 0).optim
    own = parts.recipe.train.phases[0].optim if parts.recipe.train.phases else None
    has_rest = any(name == REST for name, _ in deal_names(parts.model, config.groups))
    key = "train.phases[0].optim" if own and own.lr is not None else "optim"
    found = [f"{key}.lr={rate:g}"] if has_rest else []
    key = "train.phases[0].optim" if own and own.groups is not None else "optim"
    for pattern, peak in config.groups.items():
        place = f"[{pattern}]" if "." in pattern else f".{pattern}"
        found.append(f"{key}.groups{place}={round_to(peak * rate / config.lr):g}")
    return found
