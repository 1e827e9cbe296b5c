"""Reduces the noise in batch sizes' speeds: a step's time mostly grows linearly with the batch."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.engine.tuning.probe import Probe

MIN_SIZES = 4
"""Fit a line to at least this many sizes: fewer always lie on one."""
SHRINKAGE = 2.0
"""How much larger, in squares, than the noise what is off the line has to be for any of it to be believed."""


def towards_the_line(probes: Sequence[Probe]) -> list[Probe]:
    """The same sizes with speeds nearer to a line through their steps' times, the nearer the more noise there is.

    A step takes some time whatever the batch, and some for each image. Speeds measured in turn on a shared machine are
    off by some percent each; those of the line, to which all of them contribute, by a fifth of that near the peak. What
    is off the line by more than noise (a cache that overflows, a library that changes its ways) is kept: this is
    James and Stein's estimator (1961), its positive part.

    Args:
        probes: measured in turn.
    """
    if len(probes) < MIN_SIZES:
        return list(probes)
    # Seconds per image, over 1 / images: its slope is what an empty step would take.
    points = [(1 / probe.batch_size, 1 / probe.images_per_s) for probe in probes]
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    if slope < 0 or intercept <= 0:  # an empty step or an image would take negative time: the sizes lie on no line
        return list(probes)
    line = [slope * x + intercept for x, _ in points]
    off = [math.log(y / fitted) for (_, y), fitted in zip(points, line, strict=True)]
    variance = sum(value**2 for value in off) / (len(probes) - 2)  # a line takes two for itself
    noise = statistics.mean(probe.noise**2 for probe in probes)
    kept = max(0.0, 1 - SHRINKAGE * noise / variance) if variance else 0.0
    return [
        replace(probe, images_per_s=1 / (fitted * math.exp(kept * value)))
        for probe, fitted, value in zip(probes, line, off, strict=True)
    ]
