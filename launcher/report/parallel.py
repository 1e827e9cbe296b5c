"""Parallel coordinates: an axis for each key in which runs differ and for what came of them, a line for each run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.report.charts import LOG_SPREAD

if TYPE_CHECKING:
    from collections.abc import Sequence

BETWEEN, LEFT, RIGHT, TOP, BOTTOM, HEIGHT = 150, 24, 130, 34, 14, 320
"""Between two axes, around them, and the whole height; in the picture's units, which are CSS pixels at least."""
MOST_AXES = 12
MOST_TICKS = 8
"""Values that an axis names; of more, some."""
MOST_LETTERS = 17
"""Of a title or a value; a longer one is cut, and shown whole by its tooltip."""
UNKNOWN = "-"

Value = Any
"""Of a recipe's key, or a number; None: not known."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis, at ``x``; what is at which height."""

    x: int
    title: str
    ticks: list[tuple[float, str]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One run: an SVG path through its values."""

    path: str
    tip: str
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """What the template draws."""

    label: str
    """What a screen reader says."""
    width: int
    axes: list[Axis]
    lines: list[Line]
    height: int = HEIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def draw(names: Sequence[str], columns: Sequence[tuple[str, Sequence[Value]]], best: Sequence[bool]) -> Parallel | None:
    """Lines of runs through their values; None where a line would have no two axes, or would be alone.

    Args:
        names: of the runs.
        columns: of each axis its title, and the runs' values; the last is what came of it. Others that are the same
            for all are left out.
        best: which runs are drawn above the others, and thicker.
    """
    if not columns:
        return None
    *given, result = columns
    keys = [column for column in given if len({json.dumps(value, default=str) for value in column[1]}) > 1]
    if len(names) < 2 or not keys or not any(value is not None for value in result[1]):  # noqa: PLR2004  no line
        return None
    differing = [*keys, result]
    shown = [*keys[: MOST_AXES - 1], result]
    axes, heights = [], []
    for number, (title, values) in enumerate(shown):
        places, ticks = _scale(values)
        axes.append(Axis(x=LEFT + BETWEEN * number, title=title, ticks=ticks))
        heights.append(places)
    lines = [
        Line(
            path="M" + "L".join(f"{axis.x} {places[run]}" for axis, places in zip(axes, heights, strict=True)),
            tip=f"{name}: " + ", ".join(f"{title} {text(values[run])}" for title, values in shown),
            is_best=best[run],
        )
        for run, name in enumerate(names)
    ]
    more = len(differing) - len(shown)
    return Parallel(
        label=f"{len(names)} runs through {', '.join(title for title, _ in shown)}; the table below has the values"
        + (f", and {more} more keys" if more else ""),
        width=LEFT + BETWEEN * (len(shown) - 1) + RIGHT,
        axes=axes,
        lines=sorted(lines, key=lambda line: line.is_best),
    )


def text(value: Value) -> str:
    """A value as people read it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else UNKNOWN if value is None else json.dumps(value, default=str)


def cut(words: str) -> str:
    """As much as there is room for."""
    return words if len(words) <= MOST_LETTERS else f"{words[: MOST_LETTERS - 1]}…"


def _scale(values: Sequence[Value]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where each value is, and what the axis names: numbers by their size, anything else evenly; unknown lowest."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        logarithmic = min(known) > 0 and max(known) > LOG_SPREAD * min(known)
        sizes = {value: math.log10(value) if logarithmic else float(value) for value in known}
        low, high = min(sizes.values()), max(sizes.values())
        parts = {value: (size - low) / ((high - low) or 1) for value, size in sizes.items()}
    else:
        kinds = sorted(set(map(text, known)))
        parts = {kind: place / max(1, len(kinds) - 1) for place, kind in enumerate(kinds)}
        values = [None if value is None else text(value) for value in values]
    if len(known) < len(values):  # room for what is not known
        parts = {value: 0.15 + 0.85 * part for value, part in parts.items()}
    heights = {value: round(TOP + 12 + (HEIGHT - TOP - BOTTOM - 24) * (1 - part), 1) for value, part in parts.items()}
    lowest = HEIGHT - BOTTOM - 12.0
    named = sorted(heights, key=heights.__getitem__)
    every = math.ceil(len(named) / MOST_TICKS)
    ticks = [(heights[value], text(value)) for value in named[::every]]
    if len(known) < len(values):
        ticks.append((lowest, UNKNOWN))
    return [lowest if value is None else heights[value] for value in values], ticks
