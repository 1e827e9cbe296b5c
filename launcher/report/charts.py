"""Curves over optimizer steps: where ticks, lines and points lie. The template draws them as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

Point = tuple[float, float | None, str]
"""x, y (None: not known, the line breaks) and the tooltip."""

LOG_SPREAD = 50
"""A loss whose highest value is this many times its lowest gets a logarithmic axis."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 250, 58, 10, 30, 36
"""The size of a chart and its margins, in its own units: the page scales it."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a curve."""

    x: float
    y: float
    tip: str
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line: its name (train or val, which are CSS classes too), its SVG path and its points."""

    name: str
    path: str
    marks: list[Mark]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What the template draws; places are in the chart's units, from its left and its top."""

    title: str
    label: str
    """What a screen reader says."""
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]
    curves: list[Curve]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def line_chart(
    title: str,
    series: dict[str, list[Point]],
    show: str,
    *,
    best_x: float | None = None,
    floor: float = math.inf,
) -> Chart | None:
    """A chart of curves over optimizer steps; None where no value is known.

    Args:
        title: what y is.
        series: names (train or val), each with its points.
        show: format string of a y, for the spoken summary.
        best_x: where a ring goes on the val curve; None: nowhere.
        floor: a value that the y axis reaches down to in any case.
    """
    series = {name: points for name, points in series.items() if any(y is not None for _, y, _ in points)}
    values = [y for points in series.values() for _, y, _ in points if y is not None]
    if not values:
        return None
    logarithmic = min(values) > 0 and title == "Loss" and max(values) > LOG_SPREAD * min(values)
    levels = _log_ticks(min(values), max(values)) if logarithmic else ticks(min(*values, floor), max(values))
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    end = max(x for points in series.values() for x, _, _ in points) or 1
    low, high = scale(levels[0]), scale(levels[-1])

    def across(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * x / end, 1)

    def down(y: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - scale(y)) / (high - low), 1)

    return Chart(
        title=f"{title} (logarithmic)" if logarithmic else title,
        label=f"{title} over {end:,} optimizer steps: {_spoken(series, show)}",
        y_ticks=[(down(tick), f"{tick * 100:.4g}%" if "%" in show else f"{tick:.4g}") for tick in levels],
        x_ticks=[(across(x), f"{x:,.0f}") for x in ticks(0, end, 4) if x <= end and x == int(x)],
        curves=[_curve(name, points, across, down, best_x) for name, points in series.items()],
    )


def _curve(
    name: str,
    points: list[Point],
    across: Callable[[float], float],
    down: Callable[[float], float],
    best_x: float | None,
) -> Curve:
    path, marks, pen = [], [], "M"
    for x, y, tip in points:
        if y is None:
            pen = "M"
            continue
        mark = Mark(x=across(x), y=down(y), tip=tip, is_best=name == "val" and x == best_x)
        path.append(f"{pen}{mark.x} {mark.y}")
        pen = "L"
        marks.append(mark)
    return Curve(name=name, path="".join(path), marks=marks)


def _spoken(series: dict[str, list[Point]], show: str) -> str:
    known = {name: [y for _, y, _ in points if y is not None] for name, points in series.items()}
    return "; ".join(
        f"{name} from {show.format(ys[0])} to {show.format(ys[-1])}, lowest {show.format(min(ys))}, "
        f"highest {show.format(max(ys))}"
        for name, ys in known.items()
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most ``low`` to at least ``high``."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
