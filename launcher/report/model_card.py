"""The model card: what the model is, what it was measured to do, how to use it, and what not to expect of it."""

from __future__ import annotations

from typing import Any

import launcher
from launcher.images import pixels
from launcher.images.datasets import DATASETS
from launcher.report import templating
from launcher.report.intervals import wilson_interval

FEW_SAMPLES = 30
"""With fewer validation images, the card warns of a class's figures."""
MAX_CONFUSION_CLASSES = 20
"""With more classes, the card has no confusion matrix."""

Json = dict[str, Any]
BAKED = "onnx_baked"
"""The format of ONNX files that take images as they are."""
SHARED_METRICS = {"top1": "accuracy", "f1": "f1", "auroc": "roc_auc"}
"""Names that model hubs know, of ours."""


def front_matter(report: Json) -> Json:
    """What model hubs read at the head of a card: they list and find models by it."""
    model, val, exports = report["recipe"]["model"], report["best_val"] or {}, report["exports"] or {}
    formats = [row["format"] for row in exports.get("exports", ()) if row["accepted"]]
    known = {ours: name for ours, name in SHARED_METRICS.items() if val.get(ours) is not None}
    task = {"type": "image-classification", "name": "Image Classification"}
    data = {"type": "imagefolder", "name": f"validation images ({val.get('samples')})"}
    values = [{"type": name, "name": ours, "value": round(val[ours], 6)} for ours, name in known.items()]
    results = [{"task": task, "dataset": data, "metrics": values}] if values else []
    return {
        "license": "other",  # of the images, the weights and the code together: whoever shares it has to say
        "license_name": "not-stated",
        "library_name": "onnx" if onnx_file(exports) else "pytorch",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "finetune-launcher", *([] if model["factory"] else [model["arch"]]), *formats],
        "metrics": list(known.values()),
        "model-index": [{"name": report["name"], "results": results}],
    }


def onnx_file(exports: Json) -> str | None:
    """The ONNX file in exports/ that a reader is shown how to use: that of float32 where there is one.

    A file that was refused is not there; one that nothing could be measured of is.
    """
    rows = [row for row in exports.get("exports", ()) if row["accepted"] or row["agreement"] is None]
    rows.sort(key=lambda row: row["format"] != "onnx")
    found = (row["file"] for row in rows if row["file"].endswith(".onnx") and row["format"] != BAKED)
    return next(found, None)


def render(report: Json, recipe_yaml: str) -> str:
    """The model card, in Markdown, of what :func:`launcher.report.build.build_report` gives."""
    import yaml

    per_class, val = report["per_class"] or {}, report["best_val"] or {}
    samples = {name: row["samples"] for name, row in per_class.items()}
    return templating.card(
        "model_card.md.jinja",
        front_matter=yaml.safe_dump(front_matter(report), sort_keys=False, allow_unicode=True),
        version=launcher.__version__,
        report=report,
        data_title=DATASETS[report["recipe"]["data"]["name"]].title,
        onnx_file=onnx_file(report["exports"] or {}),
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
