"""The model card: what the model is, what it was measured to do, how to use it, and what not to expect of it."""

from __future__ import annotations

from typing import Any

from launcher.images import pixels
from launcher.images.datasets import DATASETS
from launcher.report import templating
from launcher.report.intervals import wilson_interval

FEW_SAMPLES = 30
"""With fewer validation images, the card warns of a class's figures."""
MAX_CONFUSION_CLASSES = 20
"""With more classes, the card has no confusion matrix."""

Json = dict[str, Any]


def render(report: Json, recipe_yaml: str) -> str:
    """The model card, in Markdown, of what :func:`launcher.report.build.build_report` gives."""
    per_class, val = report["per_class"] or {}, report["best_val"] or {}
    samples = {name: row["samples"] for name, row in per_class.items()}
    return templating.card(
        "model_card.md.jinja",
        report=report,
        data_title=DATASETS[report["recipe"]["data"]["name"]].title,
        recipe_yaml=recipe_yaml,
        recipe_fence=templating.fence(recipe_yaml),
        preprocessing_source=pixels.source(),
        max_confusion_classes=MAX_CONFUSION_CLASSES,
        few_samples=FEW_SAMPLES,
        few_images=[name for name, num in samples.items() if 0 < num < FEW_SAMPLES],
        no_images=[name for name, num in samples.items() if not num],
        interval=(
            wilson_interval(val["top1"], val["samples"]) if val.get("samples") and val["top1"] is not None else None
        ),
    )
