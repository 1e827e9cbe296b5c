"""Whether two models that answered the same images differ: statistics of pairs, from counts alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

Z_95 = 1.959964
"""A 95 % interval reaches this many standard deviations to either side."""
ROUNDING = 1e-9
HALVINGS = 60
"""Steps of a bisection: more than a float64 can tell apart."""


def difference_interval(lost: int, gained: int, total: int) -> tuple[float, float]:
    """95 % interval of the fraction of images that a second model loses against a first one.

    The score interval for paired proportions (Tango, Statistics in Medicine 17, 1998, 891-908). It holds for few
    images too, and where no answer differs, for which a bootstrap would claim certainty.

    Args:
        lost: images that only the first model is right about.
        gained: images that only the second model is right about.
        total: all images.

    Returns:
        The least and the greatest (lost - gained) / total that the counts allow; negative: the second model is better.
    """
    estimate = (lost - gained) / total

    def is_outside(difference: float) -> bool:
        return abs(_score(lost, gained, total, difference)) > Z_95

    return _bisect(is_outside, outside=-1.0, inside=estimate), _bisect(is_outside, outside=1.0, inside=estimate)


def _score(lost: int, gained: int, total: int, difference: float) -> float:
    """How many standard deviations the counts are from a true difference."""
    linear = (2 * total - lost + gained) * difference - lost - gained
    constant = -gained * difference * (1 - difference)
    only_second = (math.sqrt(linear * linear - 8 * total * constant) - linear) / (4 * total)
    variance = total * (2 * only_second + difference * (1 - difference))
    distance = lost - gained - total * difference
    if variance <= 0:
        return 0.0 if abs(distance) < ROUNDING else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _bisect(is_outside: Callable[[float], bool], *, outside: float, inside: float) -> float:
    for _ in range(HALVINGS):
        middle = (outside + inside) / 2
        if is_outside(middle):
            outside = middle
        else:
            inside = middle
    return inside


def mcnemar_p(lost: int, gained: int) -> float:
    """How likely so uneven counts are if both models are equally good: the exact, two-sided test of McNemar."""
    changed = lost + gained
    constant = math.lgamma(changed + 1) - changed * math.log(2)
    tail = math.fsum(
        math.exp(constant - math.lgamma(k + 1) - math.lgamma(changed - k + 1)) for k in range(min(lost, gained) + 1)
    )
    return min(1.0, 2 * tail)
