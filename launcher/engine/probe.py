"""What a batch size costs: a few real training steps with it, in a process of their own."""

from __future__ import annotations

import contextlib
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
    from collections.abc import Iterator, Sequence

    from launcher.engine.device import Device
    from launcher.engine.setup import DataSets, Parts
    from launcher.run_dir import RunDir

MIN_STEPS, MAX_STEPS = 3, 40
TIMED_S = 2.5
"""How long steps are timed; at least MIN_STEPS of them."""
QUICK_PART = 0.2
"""Of the steps, so many are quicker than the speed that is reported: others on the machine only ever make steps slower,
and on a shared machine that speed varies half as much from probe to probe as the median's."""
TURNS, TURN_S, COMPARED_S = 6, 0.6, 24.0
"""When sizes are compared: how often, and for how long, it is the turn of each, for a step at least; and beyond which
time the turns that all have had have to do."""
LONG_S = 8.0
"""Beyond which two steps have to do."""
MAX_LOADED = 256
"""Images that are loaded to see how fast that is, if there is time for as many."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured with a batch size."""

    batch_size: int
    """Images that went through the model at once."""
    images_per_s: float
    """In training, without the loading of images."""
    memory_bytes: int
    """The most that the process took for it: model, gradients and their buckets, optimizer, activations, libraries."""
    state_bytes: int
    """Of the model and the optimizer: what a checkpoint holds."""


def measure(run: RunDir, device: Device, data_sets: DataSets, batch_size: int, *, threads: int | None = None) -> Probe:
    """Train a few steps with ``batch_size`` on random images; to be called in a child process.

    It is the very step of training (:class:`TrainStep`), under DDP in a process group of this process alone, so that
    DDP's buckets are counted as they are and nobody waits for anybody. The layers learn that learn in the last epoch,
    when the most do.

    Args:
        run: its recipe says what is trained.
        device: where.
        data_sets: of the run.
        batch_size: images at once.
        threads: of the computations; None: as they are.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device.activate()
    peak = device.measure_memory()
    with _training(run, device, data_sets, batch_size) as training:
        seconds = list(_timed_steps(training, batch_size))
        return Probe(
            batch_size=batch_size,
            images_per_s=_speed(batch_size, seconds[1:]),
            memory_bytes=peak(),
            state_bytes=training.state_bytes,
        )


def compare(run: RunDir, device: Device, data_sets: DataSets, batch_sizes: Sequence[int]) -> list[Probe]:
    """As :func:`measure`, but for several batch sizes in turn: what else happens on the machine slows them all alike.

    The memory that it gives for each is the most that the process took with any of them.
    """
    device.activate()
    peak = device.measure_memory()
    seconds: dict[int, list[float]] = {size: [] for size in batch_sizes}
    with _training(run, device, data_sets, max(batch_sizes)) as training:
        began = time.monotonic()
        for turn in range(TURNS):
            for size in batch_sizes if turn % 2 else reversed(batch_sizes):
                training.step(size)  # after one of another size memory is found anew
                until = time.monotonic() + TURN_S
                seconds[size].append(training.step(size))
                while time.monotonic() < until:
                    seconds[size].append(training.step(size))
            if time.monotonic() - began > COMPARED_S:
                break
        taken, state = peak(), training.state_bytes
    return [
        Probe(batch_size=size, images_per_s=_speed(size, seconds[size]), memory_bytes=taken, state_bytes=state)
        for size in batch_sizes
    ]


def loading_speed(data_sets: DataSets) -> float:
    """Training images per second that one loader process reads, decodes and augments."""
    torch.set_num_threads(1)
    samples = data_sets.train
    indices = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:MAX_LOADED].tolist()
    samples[0, indices[0]]
    start = time.monotonic()
    num = 0
    while num < len(indices) and (num == 0 or time.monotonic() - start < TIMED_S):
        samples[0, indices[num]]
        num += 1
    return num / (time.monotonic() - start)


class _Training:
    """Real training steps on random images."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._state = TrainingState(parts)
        self._train_step = TrainStep(parts, self._state)

    def step(self, batch_size: int) -> float:
        """Take one; return its seconds."""
        parts, size = self._parts, self._parts.preprocessing.image_size
        indices = tuple(range(batch_size))
        step = Step(epoch=0, offset=0, end=0, num_samples=batch_size, micro_batches=(indices,), lone=False)
        images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
        labels = torch.randint(0, len(parts.classes), (batch_size,))
        if parts.device.pin_memory:
            images, labels = images.pin_memory(), labels.pin_memory()
        parts.device.synchronize()
        start = time.monotonic()
        self._train_step.run(step, iter([(images, labels)]))
        parts.device.synchronize()
        if self._train_step.largest_that_fits is not None:  # training would go on with smaller ones; here it must not
            raise torch.OutOfMemoryError(f"memory ran out in a step with a batch of {batch_size}")
        self._state.step += 1
        return time.monotonic() - start

    @property
    def state_bytes(self) -> int:
        """Of the model and the optimizer."""
        return _num_bytes([self._parts.model.module.state_dict(), self._parts.optimizer.state_dict()])


@contextlib.contextmanager
def _training(run: RunDir, device: Device, data_sets: DataSets, batch_size: int) -> Iterator[_Training]:
    """Training in a process group of this process alone."""
    init_process_group(device, Ranks())
    try:
        batching = Batching.even(batch_size, world_size=1, global_size=None, accumulate=1)
        parts = build_parts(run, Ranks(), device, data_sets=data_sets, batching=batching, with_weights=False)
        parts.model.freeze(parts.recipe.train.epochs - 1)
        parts.wrap()
        optim.prepare_momentum(parts.optimizer)
        parts.model.train()
        yield _Training(parts)
    finally:
        dist.destroy_process_group()


def _speed(batch_size: int, seconds: list[float]) -> float:
    return batch_size / sorted(seconds)[int(QUICK_PART * (len(seconds) - 1))]


def _timed_steps(training: _Training, batch_size: int) -> Iterator[float]:
    """Seconds of each step; the first is slower: it makes the optimizer's state, and libraries choose their ways."""
    began = time.monotonic()
    for number in range(MAX_STEPS + 1):
        yield training.step(batch_size)
        if number == 0:
            timed_since = time.monotonic()
        timed = time.monotonic() - timed_since
        enough = number >= MIN_STEPS and timed > TIMED_S
        if enough or (number >= MIN_STEPS - 1 and time.monotonic() - began > LONG_S):
            return


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict | list):
        return sum(_num_bytes(item) for item in (value.values() if isinstance(value, dict) else value))
    return 0
