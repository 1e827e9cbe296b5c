"""How a rank's cores are split between the computation and the loading of images: measured, where it pays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

IN_STEP = 0.9
"""Fraction of several loader processes' added speed that reaches training: they share memory and the file system."""
SPARE = 1.25
"""Loaders should be this many times faster than their GPU, because images differ in size."""
WORTH_IT = 1.05
"""Take a split with more processes only if it is this many times faster."""


class HostSplit(NamedTuple):
    """What a rank does with its cores."""

    threads: int
    """Threads of its computations."""
    workers: int
    """Loader processes; 0: it loads between the steps."""


def split_cpu(*, train: Mapping[int, float], load: float, cores: int, workers: int | None) -> HostSplit:
    """Where training and loading are both done by the CPU.

    Args:
        train: images per second of training by the number of threads, as measured.
        load: images per second of one loader process.
        cores: of this rank.
        workers: of the recipe; None: to be chosen.
    """

    def images_per_s(split: HostSplit) -> float:
        if not split.workers:
            return 1 / (1 / train[split.threads] + 1 / load)
        crowded = max(1, (split.workers + split.threads) / cores)  # they take turns on the cores
        return min(train[split.threads], IN_STEP * split.workers * load) / crowded

    numbers = range(cores) if workers is None else [workers]
    by_number = [max((HostSplit(n, num) for n in sorted(train, reverse=True)), key=images_per_s) for num in numbers]
    best = by_number[0]
    for split in by_number[1:]:
        if images_per_s(split) > WORTH_IT * images_per_s(best):
            best = split
    return best


def gpu_workers(*, train: float, load: float, cores: int) -> int:
    """As many loader processes as the GPU needs, if there are as many cores beside the rank's own.

    Args:
        train: images per second of training.
        load: images per second of one loader process.
        cores: of this rank.
    """
    return min(math.ceil(SPARE * train / (IN_STEP * load)), cores - 1)
