"""The model card: what the model is, what it was measured to do, how to use it, and what not to expect of it."""

from __future__ import annotations

import html
import math
import re
from typing import TYPE_CHECKING, Any

from launcher.images import pixels
from launcher.system import cpu as host_cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

FEW_SAMPLES = 30
MAX_CONFUSION_CLASSES = 20
Z_95 = 1.959964

Json = dict[str, Any]

CARD = """\
# {name}

{what} It tells {num_classes} classes apart: {classes}.

Made by `{command}` (run {run_id}, {state}).

## Data

{data} The figures below are of {samples} validation images.

## Metrics

{metrics}

## Exports

{exports}

## Use

{use}

## Limitations

{limitations}

## Recipe

Every default is written out: `launch recipe.yaml` repeats the run.

```yaml
{recipe}```
"""

USAGE = """\
`model.onnx` takes `images`, float32 N x 3 x {size} x {size} (RGB), and gives `logits`, float32 N x {num_classes}.
{preprocessing}
In this run's folder:

```python
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

{functions}
manifest = json.loads(Path("exports/manifest.json").read_text())
facts = manifest["preprocessing"]
image = to_rgb(Image.open("photo.jpg"), facts.get("background", WHITE), facts.get("grey_range"))
image = centre_crop(image, facts["resize_size"], facts["image_size"], facts["interpolation"])
pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(facts["mean"])) / np.float32(facts["std"])
session = onnxruntime.InferenceSession("exports/model.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(["logits"], {{"images": pixels.transpose(2, 0, 1)[None]}})
print(manifest["classes"][int(logits[0].argmax())])
```"""


def render(report: Json, recipe_yaml: str) -> str:
    """The model card, in Markdown, of what :func:`launcher.report.build.build_report` gives."""
    model, data, exports = report["recipe"]["model"], report["recipe"]["data"], report["exports"]
    origin = "random weights" if model["weights"] is None else f"the weights {_md(model['weights'])}"
    frozen = f", {_md(', '.join(model['freeze']))} frozen" if model["freeze"] else ""
    use = "There is no ONNX file; `launch export` on this run's folder makes one where the recipe names onnx."
    if exports and any(row["format"] == "onnx" for row in exports["exports"]):
        facts = exports["preprocessing"]
        use = USAGE.format(
            size=facts["image_size"],
            num_classes=len(exports["classes"]),
            preprocessing=pixels.describe(facts),
            functions=pixels.source(),
        )
    source = "scikit-learn's images of digits" if data["name"] == "digits" else f"image folder {_md(data['path'])}"
    return CARD.format(
        name=_md(report["name"]),
        what=f"An image classifier: torchvision's {_md(model['arch'])}, trained from {origin}{frozen}.",
        num_classes=len(report["classes"]) or "an unknown number of",
        classes=_md(", ".join(report["classes"])) or "not recorded",
        command=report["command"].replace("`", "'"),
        run_id=_md(report["run_id"]),
        state=report["state"].replace("_", " "),
        data=f"Trained on the {source}, `train/`.{_left_out(report['bad_images'])}",
        samples=(report["best_val"] or {}).get("samples") or "an unknown number of",
        metrics=_card_metrics(report),
        exports=_card_exports(exports),
        use=use,
        limitations="\n".join(f"- {line}" for line in _limitations(report)),
        recipe=recipe_yaml,
    )


def _md(value: Any) -> str:
    """Text that Markdown, tables and HTML in it leave as it is."""
    escaped = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", escaped)


def _md_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def _left_out(found: Json | None) -> str:
    num = len(found["images"]) if found else 0
    return f" {num} image{'s' if num > 1 else ''} that cannot be decoded took no part in anything." if num else ""


def _card_metrics(report: Json) -> str:
    best, val = report["best"], report["best_val"]
    if not (best and val):
        return "No validation is recorded."
    rows = [
        (_md(metric["title"]), f"{val[key]:.4f}") for key, metric in report["metrics"].items() if val[key] is not None
    ]
    text = f"Of the best checkpoint by {best['metric']} (epoch {best['epoch'] + 1}, step {best['step']}):\n\n"
    text += _md_table(("metric", "validation"), rows)
    if report["per_class"]:
        classes = [
            (_md(name), *(_figure(row, key) for key in ("recall", "precision", "f1")), str(row["samples"]))
            for name, row in report["per_class"].items()
        ]
        text += "\n\n" + _md_table(("class", "recall", "precision", "F1", "images"), classes)
    return text + _card_confusion(report["classes"], report["confusion"])


def _card_confusion(classes: list[str], matrix: list[list[int]] | None) -> str:
    if not matrix or len(classes) > MAX_CONFUSION_CLASSES:
        return ""
    names = [_md(name) for name in classes]
    rows = [(f"**{name}**", *map(str, counts), str(sum(counts))) for name, counts in zip(names, matrix, strict=True)]
    text = "Which class (rows) was taken for which (columns), in validation images:"
    return f"\n\n{text}\n\n{_md_table(('', *names, 'images'), rows)}"


def _figure(row: Json, key: str) -> str:
    """A class's figure; of one without a validation image nothing was measured."""
    return f"{row[key]:.4f}" if row["samples"] else "-"


def _card_exports(exports: Json | None) -> str:
    if not exports:
        return "None."
    head = ("file", "top-1", "points lost", "same class as the checkpoint", "MB", "ms per image (p50)", "accepted")
    rows = [
        (
            f"`{row['file']}`",
            *(
                "-" if row[key] is None else format(row[key], form)
                for key, form in (("top1", ".4f"), ("top1_drop", "+.2f"), ("agreement", ".2%"))
            ),
            f"{row['size_mb']:.1f}",
            f"{row['latency_p50_ms']:.2f}",
            "yes" if row["accepted"] else f"no: {_md(row['reason'])}",
        )
        for row in exports["exports"]
    ]
    other = (
        "" if exports["of_best"] else "\n\nThey are of another checkpoint than the best; `launch export` renews them."
    )
    absent = "".join(
        f"\n\n`{row['file']}` was not made: {_md(row['reason'])}." for row in exports.get("not_made") or []
    )
    return _md_table(head, rows) + absent + other


def _limitations(report: Json) -> list[str]:
    val, samples = report["best_val"] or {}, (report["best_val"] or {}).get("samples")
    findings = [f"**Warning**: {_md(row['message'])}. Likely cause: {_md(row['cause'])}." for row in report["findings"]]
    chosen = ", which also chose the checkpoint" if (report["best"] or {}).get("metric", "").startswith("val/") else ""
    lines = [
        *findings,
        f"All figures are of the validation images{chosen}; there was no test set, so expect less on new ones.",
        "It always answers with one of its classes, for any image; its scores are not calibrated probabilities.",
    ]
    if samples and val["top1"] is not None:
        low, high = wilson_interval(val["top1"], samples)
        lines.append(f"{samples} images leave the top-1 uncertain: 95 % interval {low:.3f} to {high:.3f} (Wilson).")
    few = [name for name, row in (report["per_class"] or {}).items() if 0 < row["samples"] < FEW_SAMPLES]
    if few:
        lines.append(f"Fewer than {FEW_SAMPLES} validation images, so figures of little worth: {_md(', '.join(few))}.")
    if rare := report["rare_classes"]:
        names = _md(", ".join(f"{name} ({num})" for name, num in rare["classes"].items()))
        rest = rare["num_classes"] - len(rare["classes"])
        more = f" and {rest} more classes" if rest else ""
        lines.append(f"Few training images, so expect little of these classes: {names}{more}.")
    unseen = [name for name, row in (report["per_class"] or {}).items() if not row["samples"]]
    if unseen:
        lines.append(f"No validation image, so that nothing is known about them: {_md(', '.join(unseen))}.")
    leaked = (report["bad_images"] or {}).get("leaked")
    if leaked:
        lines.append(f"{leaked} of the validation images are training images too, so the figures flatter.")
    if report["recipe"]["model"]["weights"] is not None:
        lines.append("The licence and the biases of the weights that training started from are its own too.")
    if report["exports"]:
        lines.append("Times are of one image at a time on the CPU of the machine that made the exports.")
        made = {row["file"]: host_cpu.only_for(row.get("quantization")) for row in report["exports"]["exports"]}
        lines += [
            f"`{file}` is only for {cpus}; on others its answers are wrong." for file, cpus in made.items() if cpus
        ]
    if report["state"] not in ("completed", "early_stopped"):
        lines.append(f"Training had not come to its end when this was written (state: {report['state']}).")
    return lines


def wilson_interval(fraction: float, samples: int) -> tuple[float, float]:
    """95 % interval of a fraction measured on ``samples`` images (score interval: Wilson, JASA 22, 1927)."""
    squared = Z_95 * Z_95
    centre = (fraction + squared / (2 * samples)) / (1 + squared / samples)
    half = Z_95 / (1 + squared / samples) * math.sqrt(fraction * (1 - fraction) / samples + squared / (4 * samples**2))
    return centre - half, centre + half
