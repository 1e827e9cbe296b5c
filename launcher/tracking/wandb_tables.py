"""A validation as wandb shows it: confusion matrix, classes, curves, and the surest mistakes with their pictures."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from launcher.runs import thumbnails

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe

COLUMNS = ("recall", "precision", "f1", "samples")
MOST_CLASSES = 100
"""With more, no matrix: nobody could read it. metrics.jsonl has none then, either."""


def of(line: dict[str, Any]) -> dict[str, Any]:
    """What a line of metrics.jsonl has of them, by wandb's names; empty: it has nothing."""
    classes = line.get("per_class")
    if not isinstance(classes, dict) or not classes:
        return {}
    import wandb

    rows: list[Any] = [[name, *(values.get(column) for column in COLUMNS)] for name, values in classes.items()]
    found: dict[str, Any] = {"val/classes": wandb.Table(columns=["class", *COLUMNS], data=rows)}
    confusion = line.get("confusion")
    if isinstance(confusion, list) and len(confusion) == len(classes) <= MOST_CLASSES:
        names = list(classes)
        cells: list[Any] = [
            [names[true], names[predicted], count]
            for true, row in enumerate(confusion)
            for predicted, count in enumerate(row)
        ]
        table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=cells)
        fields = {str(name): str(name) for name in table.columns}
        found["val/confusion"] = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "validation"})
    return found


def of_best(found: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What validation.json has, by wandb's names; empty: it has nothing."""
    return {**_curves(found.get("curves") or {}), **_mistakes(found.get("wrong") or [], recipe)}


def _curves(curves: dict[str, list[list[float]] | None]) -> dict[str, Any]:
    """ROC and precision-recall curves, a line a class."""
    import wandb

    points: list[Any] = [[name, *point] for name, found in curves.items() for point in found or ()]
    if not points:
        return {}
    made = {}
    for key, title, x, y in (
        ("val/roc", "ROC", ("false positive rate", 1), ("recall", 2)),
        ("val/pr", "precision and recall", ("recall", 2), ("precision", 3)),
    ):
        rows: list[Any] = [[point[0], point[x[1]], point[y[1]]] for point in points]
        table = wandb.Table(columns=["class", x[0], y[0]], data=rows)
        words = {"title": f"validation: {title}", "x-axis-title": x[0], "y-axis-title": y[0]}
        fields = {"x": x[0], "y": y[0], "class": "class"}
        made[key] = wandb.plot_table("wandb/area-under-curve/v0", table, fields, words)
    return made


def _mistakes(wrong: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """The surest wrong answers, each with its picture where that is there and may be sent."""
    import wandb
    from PIL import Image

    if not wrong:
        return {}
    rows: list[Any] = []
    for row in wrong:
        small = thumbnails.jpeg(row["image"], recipe.data) if recipe.tracking.pictures else None
        picture = None if small is None else wandb.Image(Image.open(io.BytesIO(small)), file_type="jpg")
        rows.append([picture, row["image"], row["true"], row["predicted"], row["confidence"]])
    columns: list[str | int] = ["picture", "image", "true", "predicted", "confidence"]
    return {"val/mistakes": wandb.Table(columns=columns, data=rows)}
