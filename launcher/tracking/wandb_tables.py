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
    made = {
        **_curves("val/roc", "ROC", found.get("roc"), "false positive rate", "recall"),
        **_curves("val/pr", "precision over recall", found.get("precision_recall"), "recall", "precision"),
    }
    return made | _mistakes(found.get("wrong") or [], recipe)


def _curves(key: str, title: str, found: dict[str, Any] | None, x: str, y: str) -> dict[str, Any]:
    """The mean and a line a class, at even places from 0 to 1."""
    import wandb

    if not found or not found["mean"]:
        return {}
    lines = {"mean of the classes": found["mean"], **found["classes"]}
    rows: list[Any] = [
        [name, round(place / (len(values) - 1), 4), value]
        for name, values in lines.items()
        for place, value in enumerate(values)
    ]
    table = wandb.Table(columns=["class", x, y], data=rows)
    words = {"title": f"validation: {title}", "x-axis-title": x, "y-axis-title": y}
    fields = {"x": x, "y": y, "class": "class"}
    return {key: wandb.plot_table("wandb/area-under-curve/v0", table, fields, words)}


def _mistakes(wrong: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """The surest wrong answers, each with its picture where that is there and may be sent."""
    import wandb
    from PIL import Image

    if not wrong:
        return {}
    rows: list[Any] = []
    shown = thumbnails.jpegs(wrong, recipe.data) if recipe.tracking.pictures else [None] * len(wrong)
    for row, small in zip(wrong, shown, strict=True):
        picture = None if small is None else wandb.Image(Image.open(io.BytesIO(small)), file_type="jpg")
        rows.append([picture, row["image"], *(in_words(row[key]) for key in ("true", "predicted")), row["confidence"]])
    columns: list[str | int] = ["picture", "image", "true", "predicted", "confidence"]
    return {"val/mistakes": wandb.Table(columns=columns, data=rows)}


def in_words(classes: str | list[str]) -> str:
    """A class, or the several classes of an image."""
    return classes if isinstance(classes, str) else ", ".join(classes) or "none"
