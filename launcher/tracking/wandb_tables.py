"""A validation's classes as wandb shows them: the confusion matrix, and a table of what each class measured."""

from __future__ import annotations

from typing import Any

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
