"""A validation as wandb shows it: confusion matrix, classes, curves, mistakes and other images with their pictures."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from launcher.tracking.pictures import in_words

if TYPE_CHECKING:
    from launcher.tracking.pictures import Pictures
    from launcher.tracking.records import Record

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


def of_best(found: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
    """What validation.json has, by wandb's names; empty: it has nothing."""
    made = {
        **_curves("val/roc", "ROC", found.get("roc"), "false positive rate", "recall"),
        **_curves("val/pr", "precision over recall", found.get("precision_recall"), "recall", "precision"),
    }
    return made | _mistakes(found.get("wrong") or [], pictures)


def pictures(record: Record, made: Pictures) -> dict[str, Any]:
    """The images that a record shows: the same of each validation with their answers, the first training batch.

    Where an image is not there, or none may be sent, all answers are a table without pictures, too.
    """
    import wandb

    shown = {"val/examples": made.examples(record), "train/batch": made.batch(record)}
    found: dict[str, Any] = {
        name: [
            wandb.Image(_opened(one.jpeg), caption=" → ".join(filter(None, (one.caption, one.answer))), file_type="jpg")
            for one in each
        ]
        for name, each in shown.items()
        if each
    }
    rows = record.line.get("examples")
    if rows and len(shown["val/examples"]) < len(rows):
        columns: list[str | int] = ["image", "true", "predicted", "confidence"]
        cells: list[Any] = [
            [row["image"], *map(in_words, (row["true"], row["predicted"])), row["confidence"]] for row in rows
        ]
        found["val/examples_table"] = wandb.Table(columns=columns, data=cells)
    return found


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


def _mistakes(wrong: list[dict[str, Any]], pictures: Pictures) -> dict[str, Any]:
    """The surest wrong answers, each with its picture where that is there and may be sent."""
    import wandb

    if not wrong:
        return {}
    rows: list[Any] = []
    for row, small in zip(wrong, pictures.thumbnails(wrong), strict=True):
        picture = None if small is None else wandb.Image(_opened(small), file_type="jpg")
        rows.append([picture, row["image"], *(in_words(row[key]) for key in ("true", "predicted")), row["confidence"]])
    columns: list[str | int] = ["picture", "image", "true", "predicted", "confidence"]
    return {"val/mistakes": wandb.Table(columns=columns, data=rows)}


def _opened(jpeg: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg))
