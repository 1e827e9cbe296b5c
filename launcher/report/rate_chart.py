"""The curve of `launch lr-find` as an SVG file that any browser shows."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 20, 44, 48
GREY, BLUE, RED = "#8a8f98", "#2563eb", "#dc2626"
LEVELS = 5
"""Lines across."""
BEYOND = 1.1
"""The chart ends so many times above the highest loss at which training was still going down; what is higher is cut."""


def draw(
    title: str, rates: Sequence[float], losses: Sequence[float], smooth: Sequence[float], suggestion: float | None
) -> str:
    """The losses as points, the smoothed ones as a line, over the logarithm of the rate; a mark at the suggestion."""
    low, high = math.log10(rates[0]), math.log10(rates[-1])
    bottom, top = min(smooth), BEYOND * max(smooth[: smooth.index(min(smooth)) + 1])
    top = max(top, bottom + 1e-9)

    def across(rate: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(rate) - low) / max(high - low, 1e-9), 1)

    def down(loss: float) -> float:
        part = (min(max(loss, bottom), top) - bottom) / (top - bottom)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * part, 1)

    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" role="img"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/><text x="{LEFT}" y="22">{escape(title)}</text>',
    ]
    for level in range(LEVELS + 1):
        loss = bottom + (top - bottom) * level / LEVELS
        parts.append(
            f'<path d="M{LEFT} {down(loss)}H{WIDTH - RIGHT}" stroke="#e5e7eb"/>'
            f'<text x="{LEFT - 8}" y="{down(loss) + 4}" text-anchor="end">{loss:.3g}</text>'
        )
    for power in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1):
        x = across(10.0**power)
        parts.append(
            f'<path d="M{x} {TOP}V{HEIGHT - BOTTOM}" stroke="#e5e7eb"/>'
            f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{10.0**power:g}</text>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">learning rate</text>')
    points = zip(rates, losses, strict=True)
    parts += [f'<circle cx="{across(rate)}" cy="{down(loss)}" r="2" fill="{GREY}"/>' for rate, loss in points]
    line = " ".join(f"{across(rate)},{down(loss)}" for rate, loss in zip(rates, smooth, strict=True))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="2"/>')
    if suggestion is not None:
        x = across(min(max(suggestion, rates[0]), rates[-1]))
        parts.append(
            f'<path d="M{x} {TOP}V{HEIGHT - BOTTOM}" stroke="{RED}" stroke-dasharray="4"/>'
            f'<text x="{x + 6}" y="{TOP + 12}" fill="{RED}">{suggestion:g}: the loss falls fastest</text>'
        )
    return "\n".join([*parts, "</svg>\n"])
