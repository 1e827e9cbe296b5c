"""What a batch size costs: a few real training steps with it, in a process of their own."""

from __future__ import annotations

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
    from collections.abc import Iterator

    from launcher.engine.device import Device
    from launcher.engine.setup import DataSets, Parts
    from launcher.run_dir import RunDir

MIN_STEPS, MAX_STEPS = 3, 40
TIMED_S = 2.5
"""How long steps are timed; at least MIN_STEPS of them."""
QUICK_PART = 0.2
"""Of the steps, so many are quicker than the speed that is reported: others on the machine only ever make steps slower,
and on a shared machine that speed varies half as much from probe to probe as the median's."""
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
    init_process_group(device, Ranks())
    try:
        batching = Batching.even(batch_size, world_size=1, global_size=None, accumulate=1)
        parts = build_parts(run, Ranks(), device, data_sets=data_sets, batching=batching, with_weights=False)
        parts.model.freeze(parts.recipe.train.epochs - 1)
        parts.wrap()
        optim.prepare_momentum(parts.optimizer)
        parts.model.train()
        state = TrainingState(parts)
        seconds = list(_timed_steps(parts, state, device, batch_size))
        state_bytes = _num_bytes([parts.model.module.state_dict(), parts.optimizer.state_dict()])
        return Probe(
            batch_size=batch_size,
            images_per_s=batch_size / sorted(seconds[1:])[int(QUICK_PART * (len(seconds) - 2))],
            memory_bytes=peak(),
            state_bytes=state_bytes,
        )
    finally:
        dist.destroy_process_group()


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


def _timed_steps(parts: Parts, state: TrainingState, device: Device, batch_size: int) -> Iterator[float]:
    """Seconds of each step; the first is slower: it makes the optimizer's state, and libraries choose their ways."""
    train_step = TrainStep(parts, state)
    size, num_classes = parts.preprocessing.image_size, len(parts.classes)
    indices = tuple(range(batch_size))
    step = Step(epoch=0, offset=0, end=0, num_samples=batch_size, micro_batches=(indices,), lone=False)
    began = time.monotonic()
    for number in range(MAX_STEPS + 1):
        images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
        labels = torch.randint(0, num_classes, (batch_size,))
        if device.pin_memory:
            images, labels = images.pin_memory(), labels.pin_memory()
        device.synchronize()
        start = time.monotonic()
        train_step.run(step, iter([(images, labels)]))
        device.synchronize()
        if train_step.largest_that_fits is not None:  # training would go on with smaller ones; here that is the answer
            raise torch.OutOfMemoryError(f"memory ran out in a step with a batch of {batch_size}")
        yield time.monotonic() - start
        state.step += 1
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
