"""How a rank's cores are split between the computation and the loading of images: measured, where it pays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

IN_STEP = 0.9
"""What of several loader processes' speed reaches training: they share memory and the file system."""
SPARE = 1.25
"""How much faster than a GPU its loaders are to be: images differ in size."""
WORTH_IT = 1.05
"""How much faster a split with more processes has to be."""


@dataclass(frozen=True, kw_only=True)
class HostSplit:
    """What a rank does with its cores."""

    threads: int
    """Of its computations."""
    workers: int
    """Loader processes; 0: it loads between the steps."""
    images_per_s: float
    """What that should give."""


def split_cpu(*, train: Mapping[int, float], load: float, cores: int, workers: int | None) -> HostSplit:
    """Where training and loading are both done by the CPU.

    Args:
        train: images per second of training by the number of threads, as measured.
        load: images per second of one loader process.
        cores: of this rank.
        workers: of the recipe; None: to be chosen.
    """
    best: HostSplit | None = None
    for num in range(cores) if workers is None else [workers]:
        for threads, speed in sorted(train.items(), reverse=True):
            together = 1 / (1 / speed + 1 / load) if num == 0 else min(speed, IN_STEP * num * load)
            if num + threads > cores and num:  # they take turns on the cores
                together *= cores / (num + threads)
            if best is None or together > best.images_per_s * (WORTH_IT if num > best.workers else 1):
                best = HostSplit(threads=threads, workers=num, images_per_s=together)
    assert best  # noqa: S101  there is at least one
    return best


def split_gpu(*, train: float, load: float, cores: int, threads: int) -> HostSplit:
    """As many loader processes as the GPU needs, if there are as many cores beside the rank's own."""
    wanted = math.ceil(SPARE * train / (IN_STEP * load))
    workers = max(0, min(wanted, cores - 1))
    reaches = IN_STEP * workers * load if workers else 1 / (1 / train + 1 / load)
    return HostSplit(threads=threads, workers=workers, images_per_s=min(train, reaches))
