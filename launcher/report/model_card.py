"""The model card: what the model is, what it was measured to do, how to use it, and what not to expect of it."""

from __future__ import annotations

import math
from typing import Any

from launcher.images import pixels
from launcher.report import templating

FEW_SAMPLES = 30
"""With fewer validation images, the card warns of a class's figures."""
MAX_CONFUSION_CLASSES = 20
"""With more classes, the card has no confusion matrix."""
Z_95 = 1.959964
"""A 95 % interval reaches this many standard deviations to either side."""

Json = dict[str, Any]


def render(report: Json, recipe_yaml: str) -> str:
    """The model card, in Markdown, of what :func:`launcher.report.build.build_report` gives."""
    per_class, val = report["per_class"] or {}, report["best_val"] or {}
    samples = {name: row["samples"] for name, row in per_class.items()}
    return templating.card(
        "model_card.md.jinja",
        report=report,
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


def wilson_interval(fraction: float, samples: int) -> tuple[float, float]:
    """95 % interval of a fraction measured on ``samples`` images (score interval: Wilson, JASA 22, 1927)."""
    squared = Z_95 * Z_95
    centre = (fraction + squared / (2 * samples)) / (1 + squared / samples)
    half = Z_95 / (1 + squared / samples) * math.sqrt(fraction * (1 - fraction) / samples + squared / (4 * samples**2))
    return centre - half, centre + half
