"""From a run directory to ``report.json``, ``report.html`` and ``model_card.md``; what is missing there is named.

:func:`build_report` is the data; the page is drawn in :mod:`launcher.report_html`, from that data alone.
"""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import statistics
from typing import TYPE_CHECKING, Any

from launcher import recipe as recipes
from launcher.errors import UsageError
from launcher.run_dir import write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from launcher.run_dir import RunDir

TRAIN_FIELDS = ("epoch", "step", "samples", "loss", "top1", "top5", "lr", "images_per_s")
VAL_FIELDS = ("epoch", "step", "samples", "loss", "top1", "top5", "f1")
AFTER_TRAINING = ("export", "completed")
"""Kinds of events that may come days after training, and so say nothing about how long it took."""
NUM_MISTAKES = 10
FEW_SAMPLES = 30
Z_95 = 1.959964

Json = dict[str, Any]


def write_report(run: RunDir) -> None:
    """Write ``report.json``, ``report.html`` and ``model_card.md``, each atomically.

    Raises:
        UsageError: ``plan.json`` or ``recipe.yaml`` cannot be read; everything else may be missing or cut short.
    """
    from launcher import report_html

    report = build_report(run)
    write_json_atomic(run.report_json, report)
    write_text_atomic(run.report_html, report_html.render(report))
    write_text_atomic(run.model_card, model_card(report, run.recipe.read_text(encoding="utf-8")))


def build_report(run: RunDir) -> Json:
    """All that the report says, as JSON holds it: string keys, None for what is not known, no NaN.

    Epochs count from 0, steps are optimizer steps done, metrics are fractions, times are seconds (``created``,
    ``started``: since 1970). The classes' figures and the confusion matrix (rows true, columns predicted) are those of
    the validation that the best checkpoint was chosen by.

    Raises:
        UsageError: ``plan.json`` or ``recipe.yaml`` cannot be read.
    """
    plan: Json = _essential(run.plan, lambda path: json.loads(path.read_text(encoding="utf-8")))
    recipe = recipes.to_dict(_essential(run.recipe, recipes.read_resolved))
    missing: list[str] = []
    status = _read_json(run.status, missing, "what the run was doing last, and its best value")
    events = _read_lines(run.events, missing, "attempts and their causes")
    metrics = _read_lines(run.metrics, missing, "curves and tables of metrics")
    manifest = _read_json(run.export_manifest, missing, "exported models and what they measured")
    state, best = status.get("state", "unknown"), status.get("best")
    train, val = _curve(metrics, "train"), _curve(metrics, "val")
    best_val = next((line for line in val if best and line["step"] == best["step"]), {})
    if best and not best_val:
        missing.append(
            f"{run.metrics.name} has no validation of step {best['step']}, which the best checkpoint is from"
        )
    attempts = _attempts(events, metrics, state)
    exports = _exports(manifest, best)
    report: Json = _clean(
        {
            "run_id": plan["run_id"],
            "name": plan["name"],
            "state": state,
            "command": plan.get("launched_by") or shlex.join(plan["command"]),
            "created": plan["created"],
            "host": plan["host"],
            "path": str(run.path),
            **{key: plan[key] for key in ("backend", "device", "nodes", "procs_per_node", "world_size")},
            "wall_s": _wall_s(events, metrics),
            "training_s": sum(row["duration_s"] for row in attempts) if attempts else None,
            "images_per_s": _median(line.get("images_per_s") for line in train),
            "attempts": attempts,
            "best": best,
            "best_val": _take(best_val, VAL_FIELDS),
            "final_val": _take(val[-1], VAL_FIELDS) if val else None,
            "curves": {
                "train": [_take(line, TRAIN_FIELDS) for line in train],
                "val": [_take(line, VAL_FIELDS) for line in val],
            },
            "classes": list(best_val.get("per_class") or manifest.get("classes", [])),
            "per_class": best_val.get("per_class"),
            "confusion": best_val.get("confusion"),
            "mistakes": _mistakes(best_val),
            "exports": exports,
            "recipe": recipe,
            "settings": _settings(recipe, recipes.to_dict(recipes.Recipe())),
            "next": _next_commands(run, state, best, exports),
            "missing": missing,
        }
    )
    return report


def _essential(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except Exception as error:  # whatever the reader raises: the file does not say what a run is made of
        raise UsageError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); a report needs the run's plan.json and "
            "recipe.yaml, which `launch RECIPE` wrote when it made the run"
        ) from error


def _read_json(path: Path, missing: list[str], holds: str) -> Json:
    """The object in a file; an empty one, and a word in ``missing``, where there is none or half of one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        missing.append(f"{path.name} is not there: {holds}")
    except ValueError:
        missing.append(f"{path.name} is cut short or damaged: {holds}")
    else:
        return dict(value)
    return {}


def _read_lines(path: Path, missing: list[str], holds: str) -> list[Json]:
    """The records of a ``.jsonl`` file. Unlike run_dir.read_jsonl it tells of a file or line that is not whole."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        missing.append(f"{path.name} is not there: {holds}")
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            missing.append(f"{path.name}, line {number}: cut short or damaged and left out")
    return records


def _curve(metrics: list[Json], split: str) -> list[Json]:
    """One line per step, by step: after a crash and a resume steps come again, and the last line counts."""
    by_step = {line["step"]: line for line in metrics if line.get("split") == split}
    return [by_step[step] for step in sorted(by_step)]


def _take(record: Json, fields: tuple[str, ...]) -> Json | None:
    return {field: record.get(field) for field in fields} if record else None


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(known) if known else None


def _wall_s(events: list[Json], metrics: list[Json]) -> float | None:
    """Seconds from the first start to the last sign of training, with the pauses between attempts."""
    times = [record["time"] for record in [*events, *metrics] if record.get("kind") not in AFTER_TRAINING]
    return max(times) - min(times) if times else None


def _attempts(events: list[Json], metrics: list[Json], state: str) -> list[Json]:
    """What each start of the workers did, and why it ended."""
    records = [record for record in [*events, *metrics] if "attempt" in record]
    numbers = sorted({record["attempt"] for record in records})
    rows = []
    for number in numbers:
        own = [record for record in records if record["attempt"] == number]
        times = [record["time"] for record in own if record.get("kind") not in AFTER_TRAINING]
        cause, message = _cause(own)
        steps = [record["step"] for record in own if "step" in record]
        rows.append(
            {
                "attempt": number,
                "started": min(times, default=None),
                "duration_s": max(times) - min(times) if times else 0.0,
                "hosts": sorted({record["host"] for record in own if record.get("kind") == "attempt_started"}),
                "resumed_step": next((record["step"] for record in own if record.get("kind") == "resumed"), None),
                "last_step": max(steps, default=None),
                "cause": cause or (state if number == numbers[-1] else "unknown"),
                "message": message,
            }
        )
    return rows


def _cause(own: list[Json]) -> tuple[str | None, str | None]:
    """Cause and message of an attempt's end; a node that saw the failure knows more than one that lost a peer."""
    ends = [record for record in own if record.get("kind") == "attempt_ended"]
    if ends:
        end = min(ends, key=lambda record: (record.get("cause") == "lost_worker", record["time"]))
        failures = [record for record in own if record.get("kind") == "failure"]
        return end.get("cause"), end.get("message") or (failures[0].get("message") if failures else None)
    return next((record["outcome"] for record in own if record.get("kind") == "training_ended"), None), None


def _mistakes(best_val: Json) -> list[Json]:
    """The most frequent confusions of one class with another, most frequent first."""
    classes = list(best_val.get("per_class") or [])
    cells = [
        {"true": classes[i], "predicted": classes[j], "count": count}
        for i, row in enumerate(best_val.get("confusion") or [])
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(cells, key=lambda cell: -cell["count"])[:NUM_MISTAKES]


def _exports(manifest: Json, best: Json | None) -> Json | None:
    """The manifest, and whether it is of the best checkpoint that the run has now."""
    if not manifest:
        return None
    return {**manifest, "of_best": best is None or manifest["checkpoint"]["step"] == best["step"]}


def _settings(values: Json, defaults: Json, prefix: str = "") -> list[Json]:
    """The recipe as rows ``{key, value, default}``; a mapping whose default is empty is a value, not a section."""
    rows: list[Json] = []
    for key, value in values.items():
        if isinstance(defaults[key], dict) and defaults[key]:
            rows += _settings(value, defaults[key], f"{prefix}{key}.")
        else:
            rows.append({"key": f"{prefix}{key}", "value": value, "default": defaults[key]})
    return rows


def _next_commands(run: RunDir, state: str, best: Json | None, exports: Json | None) -> list[Json]:
    rows = []
    if state == "failed":
        rows.append(("why", "the first failure, and its cure"))
    if state in ("preempted", "failed", "cancelled"):
        rows.append(("resume", "go on from the last checkpoint"))
    if state in ("pending", "running", "unknown"):
        rows.append(("report", "write this report again, from what is there then"))
    elif best and not (exports and exports["of_best"]):
        rows.append(("export", "export, quantize and measure the best checkpoint"))
    # The whole path: whoever reads the report stands in another folder than the one who launched.
    return [{"command": f"launch {verb} {shlex.quote(str(run.path))}", "why": why} for verb, why in rows]


def _clean(value: Any) -> Any:
    """Plain JSON: string keys, lists, and None for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def wilson_interval(fraction: float, samples: int) -> tuple[float, float]:
    """95 % interval of a fraction measured on ``samples`` images (score interval: Wilson, JASA 22, 1927)."""
    squared = Z_95 * Z_95
    centre = (fraction + squared / (2 * samples)) / (1 + squared / samples)
    half = Z_95 / (1 + squared / samples) * math.sqrt(fraction * (1 - fraction) / samples + squared / (4 * samples**2))
    return centre - half, centre + half


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
An image's short side is resized to {resize} ({interpolation}, antialiased), the centre {size} x {size} cut out, its
values divided by 255, then normalised with the mean {mean} and the standard deviation {std}.
In this run's folder:

```python
import html
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

manifest = json.loads(Path("exports/manifest.json").read_text())
facts = manifest["preprocessing"]
image = Image.open("photo.jpg").convert("RGB")
short, size = facts["resize_size"], facts["image_size"]
width, height = (int(short * side / min(image.size)) for side in image.size)
image = image.resize((width, height), Image.Resampling[facts["interpolation"].upper()])
left, top = round((width - size) / 2), round((height - size) / 2)
image = image.crop((left, top, left + size, top + size))
pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(facts["mean"])) / np.float32(facts["std"])
session = onnxruntime.InferenceSession("exports/model.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(["logits"], {{"images": pixels.transpose(2, 0, 1)[None]}})
print(manifest["classes"][int(logits[0].argmax())])
```"""


def model_card(report: Json, recipe_yaml: str) -> str:
    """The model card, in Markdown, of what :func:`build_report` gives; ``recipe_yaml`` is quoted as it is."""
    model, data, exports = report["recipe"]["model"], report["recipe"]["data"], report["exports"]
    origin = "random weights" if model["weights"] is None else f"the weights {_md(model['weights'])}"
    frozen = f", {_md(', '.join(model['freeze']))} frozen" if model["freeze"] else ""
    use = "There is no ONNX file; `launch export` on this run's folder makes one where the recipe names onnx."
    if exports and any(row["format"] == "onnx" for row in exports["exports"]):
        facts = exports["preprocessing"]
        use = USAGE.format(
            size=facts["image_size"],
            resize=facts["resize_size"],
            num_classes=len(exports["classes"]),
            **{key: facts[key] for key in ("interpolation", "mean", "std")},
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
        data=f"Trained on the {source}, `train/`.",
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


def _card_metrics(report: Json) -> str:
    best, val = report["best"], report["best_val"]
    if not (best and val):
        return "No validation is recorded."
    names = {"top1": "top-1", "top5": "top-5", "f1": "F1 (mean over classes)", "loss": "loss"}
    rows = [(name, f"{val[key]:.4f}") for key, name in names.items() if val[key] is not None]
    text = f"Of the best checkpoint by {best['metric']} (epoch {best['epoch'] + 1}, step {best['step']}):\n\n"
    text += _md_table(("metric", "validation"), rows)
    if report["per_class"]:
        classes = [
            (_md(name), *(f"{row[key]:.4f}" for key in ("recall", "precision", "f1")), str(row["samples"]))
            for name, row in report["per_class"].items()
        ]
        text += "\n\n" + _md_table(("class", "recall", "precision", "F1", "images"), classes)
    return text


def _card_exports(exports: Json | None) -> str:
    if not exports:
        return "None."
    head = ("file", "top-1", "points lost", "same class as the checkpoint", "MB", "ms per image (p50)", "accepted")
    rows = [
        (
            f"`{row['file']}`",
            f"{row['top1']:.4f}",
            f"{row['top1_drop']:+.2f}",
            f"{row['agreement']:.2%}",
            f"{row['size_mb']:.1f}",
            f"{row['latency_p50_ms']:.2f}",
            "yes" if row["accepted"] else f"no: {_md(row['reason'])}",
        )
        for row in exports["exports"]
    ]
    other = (
        "" if exports["of_best"] else "\n\nThey are of another checkpoint than the best; `launch export` renews them."
    )
    return _md_table(head, rows) + other


def _limitations(report: Json) -> list[str]:
    val, samples = report["best_val"] or {}, (report["best_val"] or {}).get("samples")
    chosen = ", which also chose the checkpoint" if (report["best"] or {}).get("metric", "").startswith("val/") else ""
    lines = [
        f"All figures are of the validation images{chosen}; there was no test set, so expect less on new ones.",
        "It always answers with one of its classes, for any image; its scores are not calibrated probabilities.",
    ]
    if samples and val["top1"] is not None:
        low, high = wilson_interval(val["top1"], samples)
        lines.append(f"{samples} images leave the top-1 uncertain: 95 % interval {low:.3f} to {high:.3f} (Wilson).")
    few = [name for name, row in (report["per_class"] or {}).items() if row["samples"] < FEW_SAMPLES]
    if few:
        lines.append(f"Fewer than {FEW_SAMPLES} validation images, so figures of little worth: {_md(', '.join(few))}.")
    if report["recipe"]["model"]["weights"] is not None:
        lines.append("The licence and the biases of the weights that training started from are its own too.")
    if report["exports"]:
        lines.append("Times are of one image at a time on the CPU of the machine that made the exports.")
    if report["state"] not in ("completed", "early_stopped"):
        lines.append(f"Training had not come to its end when this was written (state: {report['state']}).")
    return lines
