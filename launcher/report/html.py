"""The report as one HTML file that needs no other and no network; for screens of any width, and paper."""

from __future__ import annotations

import math
from typing import Any

from launcher.recipe.schema_data import DataConfig
from launcher.report import pictures, templating, thumbnails
from launcher.report.charts import Chart, Point, line_chart

Json = dict[str, Any]

MAX_HEAT_CLASSES = 30
"""With more classes, the page names the most frequent mistakes and shows no matrix."""
SPEED = ("lr", "images_per_s", "data_wait")
MAX_POINTS = 200
"""Points of a training curve; of more, the page shows means of neighbours."""
MAX_RANKS = 64
"""Rows of the table of batch sizes."""
MAX_BAD_IMAGES = 200
"""Rows of the table of bad images."""
MAX_OPEN_CLASSES = 40
"""With more classes the page shows the worst, and all of them where that is asked for."""
NUM_WEAK_CLASSES = 20
DEEPEST = 0.55
"""Opacity of a cell that has all images of its row: the text keeps its contrast in the light and in the dark."""


def render(report: Json) -> str:
    """The page, of what :func:`launcher.report.build.build_report` gives."""
    return templating.page(
        "report.html.jinja",
        report=report,
        charts=_charts(report),
        heat=_heat(report["classes"], report["confusion"]),
        calibration=pictures.calibration(report["calibration"], of=_answers_of(report)),
        precision_recall=pictures.precision_recall(report["precision_recall"]),
        scatter=pictures.accuracy_latency(report["exports"]),
        timeline=pictures.timeline(report["attempts"], report["faults"]),
        **{
            name: thumbnails.with_pictures(report["images"][name], DataConfig(**report["recipe"]["data"]))
            for name in ("wrong", "right")
        },
        max_open_classes=MAX_OPEN_CLASSES,
        num_weak_classes=NUM_WEAK_CLASSES,
        max_ranks=MAX_RANKS,
        max_bad_images=MAX_BAD_IMAGES,
    )


def _answers_of(report: Json) -> str:
    """What is answered: an image, or each class of it."""
    return "classes of images" if report["recipe"]["data"]["task"] == "multi_label" else "images"


def _charts(report: Json) -> list[Chart]:
    """One chart a metric that has values."""
    metrics, val = report["metrics"], report["curves"]["val"]
    train = _thin(report["curves"]["train"], [*metrics, *SPEED, *report["groups"]])
    best_step = report["best"]["step"] if report["best"] else None
    charts = []
    for key, metric in metrics.items():
        if metric["charted"]:
            title = metric["title"] if metric["own"] else metric["title"][:1].upper() + metric["title"][1:]
            show = "{:.2%}" if metric["fraction"] else "{:.4g}"
            curves = {"train": _points(train, key, show), "val": _points(val, key, show)}
            charts.append(line_chart(title, curves, show, best_x=best_step))
    charts.append(line_chart("Learning rate", {"train": _points(train, "lr", "{:.3g}")}, "{:.3g}", floor=0.0))
    for key in report["groups"]:
        title = f"Learning rate of {key.removeprefix('lr/')}"
        charts.append(line_chart(title, {"train": _points(train, key, "{:.3g}")}, "{:.3g}", floor=0.0))
    charts.append(
        line_chart("Images per second", {"train": _points(train, "images_per_s", "{:,.0f}")}, "{:,.0f}", floor=0.0)
    )
    waits = {"train": _points(train, "data_wait", "{:.1%}")}
    charts.append(line_chart("Share of time waiting for data", waits, "{:.1%}", floor=0.0))
    return [chart for chart in charts if chart]


def _thin(lines: list[Json], keys: list[str]) -> list[Json]:
    """At most MAX_POINTS lines, each the mean of neighbours at the step of the last of them."""
    size = math.ceil(len(lines) / MAX_POINTS)
    if size <= 1:
        return lines
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    return [{**group[-1], **{key: _mean(group, key) for key in keys}} for group in groups]


def _mean(lines: list[Json], key: str) -> float | None:
    values = [line[key] for line in lines if line[key] is not None]
    return sum(values) / len(values) if values else None


def _points(lines: list[Json], key: str, show: str) -> list[Point]:
    return [
        (
            line["step"],
            line[key],
            f"step {line['step']:,}, epoch {line['epoch'] + 1}: {templating.number(line[key], show)}",
        )
        for line in lines
    ]


def _heat(
    classes: list[str], matrix: list[list[int]] | None
) -> list[tuple[str, list[tuple[int, str, str, str]]]] | None:
    """The rows of the confusion matrix, each cell with its opacity and its CSS class; None: no matrix is shown."""
    if not matrix or len(classes) > MAX_HEAT_CLASSES:
        return None
    rows = []
    for i, (name, counts) in enumerate(zip(classes, matrix, strict=True)):
        total = max(1, sum(counts))
        said = [
            f"{count} of {total} images of {name} taken for {other}"
            for other, count in zip(classes, counts, strict=True)
        ]
        cells = [(*_heat_cell(count, total, is_hit=i == j), said[j]) for j, count in enumerate(counts)]
        rows.append((name, cells))
    return rows


def _heat_cell(count: int, total: int, *, is_hit: bool) -> tuple[int, str, str]:
    return count, f"{DEEPEST * count / total:.2f}", "hit" if is_hit else "" if count else "soft"
