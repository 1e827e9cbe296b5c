"""Checks whether images with more than 8 bits use the range that they would be scaled from.

One image cannot tell a dark picture from one of 12 bits in 16; all images of a data set together can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.images import pixels
from launcher.images.probe import COLOURS_16_BIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from launcher.images.probe import Levels

FULL = (0.0, 65535.0)
FEW = 16
"""If several kinds of images share one range, a kind that uses less than 1/16 of it was not meant by it."""
HALF = 32768
"""If no 16-bit image has a value of at least this, the highest bit is not used."""


def judge(levels: Iterable[Levels | None], grey_range: Sequence[float] | None) -> Callable[[Levels | None], str]:
    """A function that says why an image cannot be scaled, or "".

    Args:
        levels: of all images of the data set.
        grey_range: the recipe's ``data.grey_range``; None: auto.
    """
    highest = {kind: high for kind, (_, high) in span(levels).items()}

    def problem(found: Levels | None) -> str:
        if not found:
            return ""
        kind, low, high = found
        top = highest[kind]
        unused = kind in ("16 bits", COLOURS_16_BIT) and 0 < top < HALF
        if kind == COLOURS_16_BIT:
            if not unused or (grey_range and tuple(grey_range) == FULL):
                return ""
            return f"{_seen(low, high, kind, top)}; Pillow keeps only their upper 8 bits: save such images with 8 bits"
        if unused and not grey_range:
            return _seen(low, high, kind, top)
        if grey_range and len(highest) > 1 and 0 < top < grey_range[0] + (grey_range[1] - grey_range[0]) / FEW:
            return (
                f"{kind} from {low:g} to {high:g}: data.grey_range {list(grey_range)} fits other images of this data "
                "set, and not these; save them with 8 bits"
            )
        return pixels.range_problem(kind, low, high, grey_range)

    return problem


def span(levels: Iterable[Levels | None]) -> dict[str, tuple[float, float]]:
    """The lowest and the highest value of all images of each kind."""
    result: dict[str, tuple[float, float]] = {}
    for kind, low, high in filter(None, levels):
        lowest, highest = result.get(kind, (low, high))
        result[kind] = min(low, lowest), max(high, highest)
    return result


def _seen(low: float, high: float, kind: str, top: float) -> str:
    return f"{kind} from {low:g} to {high:g}, and no such image of this data set has more than {top:g} of 65535"
