"""Curves over optimizer steps as inline SVG; its colours are those of the page around it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from launcher.report.markup import escape

if TYPE_CHECKING:
    from collections.abc import Callable

Point = tuple[float, float | None, str]
"""x, y (None: not known, the line breaks) and what the pointer is told."""

LOG_SPREAD = 50
MAX_POINTS = 200
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 250, 58, 10, 30, 36


def line_chart(
    title: str,
    series: dict[str, list[Point]],
    show: str,
    *,
    best_x: float | None = None,
    floor: float = math.inf,
) -> str:
    """A figure of curves over optimizer steps, as inline SVG.

    Args:
        title: what y is.
        series: names (train or val, which are CSS classes too), each with its points.
        show: format string of a y, for the spoken summary.
        best_x: where a ring goes on the val curve; None: nowhere.
        floor: a value that the y axis reaches down to in any case.
    """
    series = {name: points for name, points in series.items() if any(y is not None for _, y, _ in points)}
    values = [y for points in series.values() for _, y, _ in points if y is not None]
    if not values:
        return ""
    logarithmic = min(values) > 0 and title == "Loss" and max(values) > LOG_SPREAD * min(values)
    ticks = _log_ticks(min(values), max(values)) if logarithmic else _ticks(min(*values, floor), max(values))
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    end = max(x for points in series.values() for x, _, _ in points) or 1
    low, high = scale(ticks[0]), scale(ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        down = (high - scale(y)) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * x / end, TOP + (HEIGHT - TOP - BOTTOM) * down

    parts = [_axes(ticks, end, place, percent="%" in show)]
    parts += [_series(name, points, place, best_x) for name, points in series.items()]
    if len(series) > 1:
        parts.append(_legend(list(series)))
    known = {name: [y for _, y, _ in points if y is not None] for name, points in series.items()}
    spoken = "; ".join(
        f"{name} from {show.format(ys[0])} to {show.format(ys[-1])}, lowest {show.format(min(ys))}, "
        f"highest {show.format(max(ys))}"
        for name, ys in known.items()
    )
    label = f"{title} over {end:,} optimizer steps: {spoken}"
    head = f"{title} (logarithmic)" if logarithmic else title
    return (
        f'<figure><h3>{head}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def thin(lines: list[dict[str, Any]], keys: list[str]) -> list[dict[str, Any]]:
    """At most MAX_POINTS lines, each the mean of neighbours at the step of the last of them."""
    size = math.ceil(len(lines) / MAX_POINTS)
    if size <= 1:
        return lines
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    return [{**group[-1], **{key: _mean(group, key) for key in keys}} for group in groups]


def _mean(lines: list[dict[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if line[key] is not None]
    return sum(values) / len(values) if values else None


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most ``low`` to at least ``high``."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _axes(
    ticks: list[float], end: float, place: Callable[[float, float], tuple[float, float]], *, percent: bool
) -> str:
    parts = []
    for tick in ticks:
        x, y = place(0, tick)
        text = f"{tick * 100:.4g}%" if percent else f"{tick:.4g}"
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for tick in (tick for tick in _ticks(0, end, 4) if tick <= end and tick == int(tick)):
        x, y = place(tick, ticks[0])
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 5:.1f}"/>'
            f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:,.0f}</text>'
        )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">optimizer steps</text>')
    return "".join(parts)


def _series(
    name: str, points: list[Point], place: Callable[[float, float], tuple[float, float]], best_x: float | None
) -> str:
    path, marks, pen = [], [], "M"
    for x, y, tip in points:
        if y is None:
            pen = "M"
            continue
        left, top = place(x, y)
        path.append(f"{pen}{left:.1f} {top:.1f}")
        pen = "L"
        at = f'cx="{left:.1f}" cy="{top:.1f}"'
        best = name == "val" and x == best_x
        css, radius = (f"{name} best", 5) if best else (name, 3 if name == "val" else 1.5)
        more = " (best checkpoint)" if best else ""
        marks.append(
            f'<g><title>{name}, {escape(tip)}{more}</title><circle class="{css}" {at} r="{radius}"/>'
            f'<circle class="hit" {at} r="7"/></g>'
        )
    return f'<path class="curve {name}" d="{"".join(path)}"/>{"".join(marks)}'


def _legend(names: list[str]) -> str:
    return "".join(
        f'<line class="curve {name}" x1="{LEFT + 80 * i}" x2="{LEFT + 80 * i + 22}" y1="14" y2="14"/>'
        f'<text x="{LEFT + 80 * i + 28}" y="18">{name}</text>'
        for i, name in enumerate(names)
    )
