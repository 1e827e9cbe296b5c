"""Measures speed and memory of a batch size by a few real training steps in a process of their own."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.engine import optim
from launcher.engine.distributed import Ranks, init_process_group
from launcher.engine.schedule import Batching, Step
from launcher.engine.setup import build_parts
from launcher.engine.state import TrainingState
from launcher.engine.train_step import TrainStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from launcher.engine.device import Device
    from launcher.engine.loading.data_sets import DataSets
    from launcher.engine.numerics import Numerics
    from launcher.engine.setup import Parts
    from launcher.engine.tuning.budget import Budget
    from launcher.runs.run_dir import RunDir

TURN_S = 0.4
"""Seconds of a turn, at least."""
TURNS, TURNS_COMPARED, MIN_TURNS = 4, 8, 2
"""Turns of each thing that is timed: usually, where sizes are compared, and at least."""
MOST_S, MOST_COMPARED_S = 6.0, 30.0
"""Seconds after which no more turns begin."""
QUICK_PART = 1 / 3
"""Take the speed from this fraction of the turns, the quickest: other load on the machine only makes steps slower."""
BATCHES_HELD = 2
"""On the device, in a probe as in training: that of the step and the next one's."""
MAX_LOADED, LOADED_S = 256, 2.5
"""Load this many images, if there is time, to measure the speed of loading."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured with a batch size."""

    batch_size: int
    """Images that went through the model at once."""
    images_per_s: float
    """Speed in training, without the loading of images."""
    memory_bytes: int
    """The most that the process took for it: model, gradients and their buckets, optimizer, activations, libraries."""
    state_bytes: int
    """Size of model and optimizer: what a checkpoint holds."""
    noise: float = 0.0
    """Relative error of the speed; 0: unknown."""


def measure(
    run: RunDir,
    device: Device,
    data_sets: DataSets,
    batch_size: int,
    *,
    beside: Probe | None = None,
    numerics: Numerics | None = None,
    budget: Budget | None = None,
) -> Probe:
    """Train a few steps with ``batch_size`` on random images; to be called in a child process.

    It is the very step of training (:class:`TrainStep`), under DDP in a process group of this process alone, so that
    DDP's buckets are counted as they are and nobody waits for anybody. The layers learn that learn in the phase that
    takes the most memory.

    Args:
        run: its recipe says what is trained.
        device: where.
        data_sets: of the run.
        batch_size: images at once.
        beside: of a smaller size, which takes turns with this one: the speed that is returned is what it would have
            been when that one was measured. A shared machine is half as fast a minute later.
        numerics: what the ranks have agreed to compute in; None: what the device prefers.
        budget: by which a short run gets fewer and shorter turns; None: it is not bounded.
    """
    device.activate()
    peak = device.measure_memory()
    with _training(run, device, data_sets, batch_size, numerics) as training:
        steps = {batch_size: functools.partial(training.step, batch_size)}
        if beside:
            steps[beside.batch_size] = functools.partial(training.step, beside.batch_size)
        speed = {size: size / _quick(found) for size, found in _in_turn(steps, budget=budget).items()}
        then_and_now = beside.images_per_s / speed[beside.batch_size] if beside else 1.0
        return Probe(
            batch_size=batch_size,
            images_per_s=speed[batch_size] * then_and_now,
            memory_bytes=peak(),
            state_bytes=training.state_bytes,
        )


def compare(
    run: RunDir,
    device: Device,
    data_sets: DataSets,
    batch_sizes: Sequence[int],
    *,
    numerics: Numerics | None = None,
) -> list[Probe]:
    """As :func:`measure`, but for several batch sizes in turn: what else happens on the machine slows them all alike.

    The memory that it gives for each is the most that the process took with any of them.
    """
    device.activate()
    peak = device.measure_memory()
    with _training(run, device, data_sets, max(batch_sizes), numerics) as training:
        steps = {size: functools.partial(training.step, size) for size in batch_sizes}
        seconds = _in_turn(steps, TURNS_COMPARED, MOST_COMPARED_S)
        taken, state = peak(), training.state_bytes
    return [
        Probe(
            batch_size=size,
            images_per_s=size / _quick(found),
            noise=_noise(found),
            memory_bytes=taken,
            state_bytes=state,
        )
        for size, found in seconds.items()
    ]


def compare_threads(
    run: RunDir,
    device: Device,
    data_sets: DataSets,
    batch_size: int,
    counts: Sequence[int],
    *,
    numerics: Numerics | None = None,
) -> dict[int, float]:
    """Images per second in training with ``batch_size``, by the number of threads, which take turns."""
    device.activate()
    with _training(run, device, data_sets, batch_size, numerics) as training:

        def step(threads: int) -> float:
            torch.set_num_threads(threads)
            return training.step(batch_size)

        seconds = _in_turn({count: functools.partial(step, count) for count in counts})
    return {count: batch_size / _quick(found) for count, found in seconds.items()}


def loading_speed(data_sets: DataSets) -> float:
    """Training images per second that one loader process reads, decodes and augments."""
    torch.set_num_threads(1)
    samples = data_sets.train
    indices = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:MAX_LOADED].tolist()
    samples[0, indices[0]]
    start = time.monotonic()
    num = 0
    while num < len(indices) and (num == 0 or time.monotonic() - start < LOADED_S):
        samples[0, indices[num]]
        num += 1
    return num / (time.monotonic() - start)


class _Training:
    """Real training steps on random images."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._state = TrainingState(parts)
        self._state.epoch = parts.recipe.train.swa or 0  # one that has the mean of the weights, where there will be one
        self._train_step = TrainStep(parts, self._state)

    def step(self, batch_size: int) -> float:
        """Take one; return its seconds."""
        parts, size = self._parts, self._parts.preprocessing.image_size
        indices = tuple(index % parts.schedule.num_samples for index in range(batch_size))
        step = Step(epoch=0, offset=0, end=0, num_samples=batch_size, micro_batches=(indices,), lone=False)
        shape = (batch_size, parts.preprocessing.channels, size, size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        batch = images, parts.made_up_targets(batch_size)
        sent = [parts.device.send(batch) for _ in range(BATCHES_HELD)]
        parts.device.synchronize()
        start = time.monotonic()
        self._train_step.run(step, iter([sent[0]()]))
        parts.device.synchronize()
        if self._train_step.largest_that_fits is not None:  # training would go on with smaller ones; here it must not
            raise torch.OutOfMemoryError(f"memory ran out in a step with a batch of {batch_size}")
        self._state.step += 1
        return time.monotonic() - start

    @property
    def state_bytes(self) -> int:
        """Size of model and optimizer."""
        return _num_bytes([self._parts.model.module.state_dict(), self._parts.optimizer.state_dict()])


@contextlib.contextmanager
def _training(
    run: RunDir, device: Device, data_sets: DataSets, batch_size: int, numerics: Numerics | None = None
) -> Iterator[_Training]:
    """Training in a process group of this process alone."""
    init_process_group(device, Ranks())
    try:
        batching = Batching.even(batch_size, world_size=1, global_size=None, accumulate=1)
        parts = build_parts(run, Ranks(), device, data_sets=data_sets, batching=batching, with_weights=False)
        if numerics:
            parts.take(numerics)
        parts.enter(parts.model.hungriest_epoch())
        parts.wrap()
        optim.prepare_momentum(parts.optimizer)
        parts.model.train()
        yield _Training(parts)
    finally:
        dist.destroy_process_group()


def _in_turn(
    steps: Mapping[int, Callable[[], float]],
    turns: int = TURNS,
    most_s: float = MOST_S,
    budget: Budget | None = None,
) -> dict[int, list[float]]:
    """Seconds of a step, as each step tells them, in each of its turns: the median of the turn.

    Before that each is taken once: it may make the optimizer's state, and libraries choose their algorithms for a size
    when they first meet it (cuDNN tries them all). The largest comes first, for allocators fit the others into it.
    """
    first = {name: steps[name]() for name in sorted(steps, reverse=True)}
    turn_s = TURN_S
    if budget:
        most_s = min(most_s, budget.turns_s(max(name / first[name] for name in first)))
        turn_s = min(turn_s, most_s / (MIN_TURNS * len(steps)))
    seconds: dict[int, list[float]] = {name: [] for name in steps}
    began = time.monotonic()
    for turn in range(turns):
        if turn >= MIN_TURNS and time.monotonic() - began > most_s:
            break
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            until = time.monotonic() + turn_s
            found = [steps[name]()]
            while time.monotonic() < until:
                found.append(steps[name]())
            seconds[name].append(statistics.median(found))
    return seconds


def _quick(seconds: Sequence[float]) -> float:
    """The mean of the quickest turns."""
    return statistics.mean(sorted(seconds)[: max(1, round(len(seconds) * QUICK_PART))])


def _noise(seconds: Sequence[float]) -> float:
    """By which part :func:`_quick` may be off: half of what it differs by between every other turn and the rest."""
    return abs(math.log(_quick(seconds[::2]) / _quick(seconds[1::2]))) / 2


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict | list):
        return sum(_num_bytes(item) for item in (value.values() if isinstance(value, dict) else value))
    return 0
