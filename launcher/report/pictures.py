"""The report's pictures besides curves: calibration, exports, and the run's time; the template draws them as SVG."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.report import templating
from launcher.report.charts import ticks

if TYPE_CHECKING:
    from collections.abc import Callable

Json = dict[str, Any]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 250, 58, 14, 16, 36
"""The size of a picture and its margins, in its own units: the page scales it."""
LANE = 22
"""Height of an attempt in the picture of the run's time."""
MOST_LANES = 12
"""Attempts that it shows, the last ones."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A rectangle, or a point where it has no width."""

    x: float
    y: float
    width: float = 0.0
    height: float = 0.0
    css: str = ""
    tip: str = ""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What the template draws; places are in the picture's units, from its left and its top."""

    title: str
    label: str
    """What a screen reader says."""
    x_title: str
    height: int = HEIGHT
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    curves: list[tuple[str, str, str]] = field(default_factory=list)
    """CSS class, SVG path and tooltip of each line."""
    diagonal: bool = False
    width: int = WIDTH
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP

    @property
    def bottom(self) -> int:
        """Where the x axis is."""
        return self.height - BOTTOM


def _across(low: float, high: float) -> Callable[[float], float]:
    return lambda x: round(LEFT + (WIDTH - LEFT - RIGHT) * (x - low) / ((high - low) or 1), 1)


def _down(low: float, high: float, height: int = HEIGHT) -> Callable[[float], float]:
    return lambda y: round(TOP + (height - TOP - BOTTOM) * (high - y) / ((high - low) or 1), 1)


def _percents(place: Callable[[float], float]) -> list[tuple[float, str]]:
    """Ticks of an axis of fractions."""
    return [(place(quarter / 4), f"{quarter * 25}%") for quarter in range(5)]


def calibration(bins: list[list[float]] | None, *, of: str = "images") -> Picture | None:
    """How often answers of each confidence are right; None where it is not known.

    Args:
        bins: of each the number of answers, the sum of their confidences, and those that are right.
        of: what is answered.
    """
    rows = [row for row in bins or [] if row[0]]
    if not rows:
        return None
    across, down, total = _across(0, 1), _down(0, 1), sum(row[0] for row in rows)
    shapes, wide = [], (WIDTH - LEFT - RIGHT) / len(bins or [1])
    for number, (images, confidences, hits) in enumerate(bins or []):
        if images:
            right, sure = hits / images, confidences / images
            tip = f"confidence {sure:.0%} on average: {right:.0%} of {images:,.0f} {of} are right"
            y, x = down(right), LEFT + wide * number
            shapes.append(
                Shape(x=round(x + 1, 1), y=y, width=round(wide - 2, 1), height=round(down(0) - y, 1), tip=tip)
            )
    gap = sum(abs(confidences - hits) for _, confidences, hits in rows) / total
    too = "too sure" if sum(row[1] for row in rows) > sum(row[2] for row in rows) else "not sure enough"
    return Picture(
        title="Calibration",
        label=f"How often answers of each confidence are right; on average {gap:.1%} off, {too} on the whole",
        x_title="how sure the model is",
        y_ticks=_percents(down),
        x_ticks=_percents(across),
        shapes=shapes,
        diagonal=True,
    )


def precision_recall(found: Json | None) -> Picture | None:
    """Precision over recall, of each class and in the mean; None where it is not known."""
    if not found or not found["mean"]:
        return None
    across, down = _across(0, 1), _down(0, 1)
    areas = {name: sum(row) / len(row) for name, row in found["classes"].items()}
    rows = [("thin", f"{name}: on average {areas[name]:.1%}", row) for name, row in found["classes"].items()]
    mean = sum(found["mean"]) / len(found["mean"])
    rows.append(("train", f"the mean of the classes: on average {mean:.1%}", found["mean"]))
    curves = []
    for css, tip, row in rows:
        steps = enumerate(row)
        path = "M" + "L".join(f"{across(place / (len(row) - 1))} {down(precision)}" for place, precision in steps)
        curves.append((css, path, tip))
    lowest = min(areas, key=areas.__getitem__, default=None)
    said = f"; the lowest class is {lowest} with {areas[lowest]:.1%}" if lowest is not None else ""
    return Picture(
        title="Precision and recall",
        label=f"Precision over recall: on average {mean:.1%} in the mean of the classes{said}",
        x_title="recall",
        y_ticks=_percents(down),
        x_ticks=_percents(across),
        curves=curves,
    )


def accuracy_latency(exports: Json | None) -> Picture | None:
    """Each export's top-1 over its time; None where fewer than two were measured."""
    if not exports:
        return None
    named = [(row.get("file", "the checkpoint"), row) for row in [exports["reference"], *exports["exports"]]]
    rows = [(name, row) for name, row in named if row.get("top1") is not None and row.get("latency_p50_ms")]
    if len(rows) < 2:  # noqa: PLR2004  one point shows nothing
        return None
    xs, ys = ticks(0, max(row["latency_p50_ms"] for _, row in rows), 4), ticks(*_span(rows))
    across, down = _across(xs[0], xs[-1]), _down(ys[0], ys[-1])
    shapes = [
        Shape(
            x=across(row["latency_p50_ms"]),
            y=down(row["top1"]),
            css="train" if row.get("accepted", True) else "val",
            tip=f"{name}: top-1 {row['top1']:.2%} in {row['latency_p50_ms']:.2f} ms"
            + ("" if row.get("accepted", True) else ", not accepted"),
            text=name,
        )
        for name, row in rows
    ]
    return Picture(
        title="Accuracy and time",
        label="; ".join(shape.tip for shape in shapes),
        x_title="ms an image (p50)",
        y_ticks=[(down(y), f"{y * 100:.4g}%") for y in ys],
        x_ticks=[(across(x), f"{x:g}") for x in xs],
        shapes=shapes,
    )


def _span(rows: list[tuple[str, Json]]) -> tuple[float, float]:
    values = [row["top1"] for _, row in rows]
    return min(values), max(values)


def timeline(attempts: list[Json], faults: list[Json]) -> Picture | None:
    """The attempts as bars over the time, with what happened; None for one that nothing happened to."""
    shown = [row for row in attempts if row["started"] is not None][-MOST_LANES:]
    if not shown or (len(attempts) == 1 and not faults):
        return None
    begin = shown[0]["started"]
    end = max(row["started"] + row["duration_s"] for row in shown)
    across = _across(0, max(end - begin, 1e-3))
    height = TOP + LANE * len(shown) + BOTTOM
    lanes = {row["attempt"]: TOP + LANE * number for number, row in enumerate(shown)}
    bars = [
        Shape(
            x=across(row["started"] - begin),
            y=lanes[row["attempt"]] + 3,
            width=max(2.0, round(across(row["duration_s"]) - LEFT, 1)),
            height=LANE - 8,
            tip=f"attempt {row['attempt']}: {templating.duration(row['duration_s'])}, {row['cause'].replace('_', ' ')}",
        )
        for row in shown
    ]
    marks = [
        Shape(
            x=across(row["time"] - begin),
            y=lanes.get(row["attempt"], TOP) + LANE / 2 - 1,
            css="fault",
            tip=f"{row['kind'].replace('_', ' ')}: {row['message']}",
        )
        for row in faults
        if begin <= row["time"] <= end
    ]
    return Picture(
        title="What happened when",
        label=f"{len(attempts)} attempts over {templating.duration(end - begin)}, {len(faults)} events",
        x_title="since the first start shown",
        height=height,
        y_ticks=[(lanes[row["attempt"]] + LANE / 2, str(row["attempt"])) for row in shown],
        x_ticks=[
            (across((end - begin) * part / 2), templating.duration((end - begin) * part / 2)) for part in range(3)
        ],
        shapes=bars + marks,
    )
