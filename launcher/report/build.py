"""Makes ``report.json``, ``report.html`` and ``model_card.md`` from a run directory, and names missing files.

:func:`build_report` is the data; the page is drawn in :mod:`launcher.report.html` and the card written in
:mod:`launcher.report.model_card`, from that data alone.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError
from launcher.recipe import load as recipes
from launcher.recipe import metrics as recipe_metrics
from launcher.report import details, intervals, test_set
from launcher.runs import findings
from launcher.system.files import write_json_atomic, write_text_atomic
from launcher.tracking import wandb_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launcher.recipe.metrics import Metric
    from launcher.runs.run_dir import RunDir

POSITION = ("epoch", "step", "samples")
SPEED = ("lr", "images_per_s", "data_wait")
AFTER_TRAINING = ("export", "completed", wandb_folder.UNSYNCED)
"""Kinds of events that may come days after training: they do not count as training time."""
NUM_MISTAKES = 10

Json = dict[str, Any]


def write_report(run: RunDir) -> None:
    """Write ``report.json``, ``report.html`` and ``model_card.md``, each atomically.

    Raises:
        UsageError: ``plan.json`` or ``recipe.yaml`` cannot be read; everything else may be missing or cut short.
    """
    from launcher.report import html as report_html
    from launcher.report import model_card as report_model_card

    report = build_report(run)
    write_json_atomic(run.report_json, report)
    write_text_atomic(run.report_html, report_html.render(report))
    write_text_atomic(run.model_card, report_model_card.render(report, run.recipe.read_text(encoding="utf-8")))


def build_report(run: RunDir) -> Json:
    """The report's content as plain JSON: string keys, None for what is not known, no NaN.

    Epochs count from 0, steps are optimizer steps done, metrics are fractions, times are seconds (``created``,
    ``started``: since 1970). The classes' figures and the confusion matrix (rows true, columns predicted) are those of
    the validation that the best checkpoint was chosen by.

    Raises:
        UsageError: ``plan.json`` or ``recipe.yaml`` cannot be read.
    """
    plan, launched = _essential(run.plan, lambda _: (run.read_plan(), run.read_launched()))
    recipe = recipes.to_dict(_essential(run.recipe, recipes.read_resolved))
    missing: list[str] = []
    status = _read_json(run.status, missing, "what the run was doing last, and its best value")
    events = _read_lines(run.events, missing, "attempts and their causes")
    table = recipe_metrics.of(recipe["metrics"])
    metrics = _without_trivial(_read_lines(run.metrics, missing, "curves and tables of metrics"))
    manifest = _read_json(run.export_manifest, missing, "exported models and what they measured")
    state, best = status.get("state", "unknown"), status.get("best")
    train, val = _curve(metrics, "train"), _curve(metrics, "val")
    best_val = _best_validation(val, best)
    if best and not best_val:
        missing.append(f"{run.metrics.name} has no validation of step {best['step']}, that of the best checkpoint")
    attempts = _attempts(events, metrics, state)
    exports = _exports(manifest, best)
    groups = sorted({name for line in train for name in line if name.startswith("lr/")})
    report: Json = _clean(
        {
            **{key: getattr(plan, key) for key in ("run_id", "name")},
            "state": state,
            "command": launched.launched_by or shlex.join(plan.command),
            **{key: getattr(launched, key) for key in ("created", "host", "commit")},
            "path": str(run.path),
            **{key: getattr(plan, key) for key in ("backend", "device", "nodes", "procs_per_node", "world_size")},
            **_durations(events, metrics, attempts, exports),
            "images_per_s": _median(line.get("images_per_s") for line in train),
            "attempts": attempts,
            "best": best,
            **_measured(table, best_val, train, val, groups),
            "groups": groups,
            "intervals": details.drawn_intervals(run, best) | intervals.of_validation(best_val, table),
            "test": test_set.of_run(metrics, best, table, recipe),
            "noise": _noise(events, best),
            "classes": list(best_val.get("per_class") or manifest.get("classes", [])),
            **{key: best_val.get(key) for key in ("ranking", "per_class", "confusion")},
            "mistakes": _mistakes(best_val),
            **details.of_run(run, events, train, best_val, best, missing),
            "findings": [asdict(found) for found in findings.of_run(run)],
            "rare_classes": _rare_classes(events),
            "features": _features(events),
            "exports": exports,
            "batch_sizes": _batch_sizes(run, events, missing),
            "bad_images": _bad_images(run, missing),
            "recipe": recipe,
            "settings": _settings(recipe, recipes.to_dict(recipes.from_dict({}))),
            "next": details.next_commands(run, state, best, exports) + details.sync_command(run, state, events),
            "missing": missing,
        }
    )
    return report | details.of_report(run, report, events)


def _essential(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except Exception as error:  # whatever the reader raises: the file does not say what a run is made of
        raise UsageError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); a report needs the run's plan.json and "
            "recipe.yaml, which `launch RECIPE` wrote when it made the run"
        ) from error


def _read_json(path: Path, missing: list[str], holds: str) -> Json:
    """The object in a file; if it is missing or damaged, an empty one and a line in ``missing``."""
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
    """The records of a ``.jsonl`` file. Unlike files.read_jsonl it reports a missing file and damaged lines."""
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


def _durations(events: list[Json], metrics: list[Json], attempts: list[Json], exports: Json | None) -> Json:
    """Seconds: of all training with its pauses, without them, of the exports, and of all together."""
    wall_s, export_s = _wall_s(events, metrics), (exports or {}).get("seconds")
    return {
        "wall_s": wall_s,
        "export_s": export_s,
        "total_s": None if wall_s is None else wall_s + (export_s or 0.0),
        "training_s": sum(row["duration_s"] for row in attempts) if attempts else None,
    }


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
    """Cause and message of an attempt's end; a node that saw the failure goes before one that lost a peer."""
    ends = [record for record in own if record.get("kind") == "attempt_ended"]
    if ends:
        end = min(ends, key=lambda record: (record.get("cause") == "lost_worker", record["time"]))
        failures = [record for record in own if record.get("kind") == "failure"]
        return end.get("cause"), end.get("message") or (failures[0].get("message") if failures else None)
    return next((record["outcome"] for record in own if record.get("kind") == "training_ended"), None), None


def _mistakes(best_val: Json) -> list[Json]:
    """The most frequent confusions of one class with another, most frequent first."""
    if "mistakes" in best_val:  # with too many classes for a recorded matrix
        return list(best_val["mistakes"])
    classes = list(best_val.get("per_class") or [])
    cells = [
        {"true": classes[i], "predicted": classes[j], "count": count}
        for i, row in enumerate(best_val.get("confusion") or [])
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(cells, key=lambda cell: -cell["count"])[:NUM_MISTAKES]


def _best_validation(val: list[Json], best: Json | None) -> Json:
    """What the best checkpoint measured: of the average of the weights where that was better, and is exported."""
    found: Json = next((line for line in val if best and line["step"] == best["step"]), {})
    if best and best.get("weights"):
        of = f"{best['weights']}_"
        return found | {name.removeprefix(of): found[name] for name in found if name.startswith(of)}
    return found


def _noise(events: list[Json], best: Json | None) -> Json | None:
    """Where the best checkpoint beats the one before by no more than chance: by how much, and what chance makes."""
    found = [event for event in events if event.get("kind") == "best_within_noise"]
    last = next((event for event in reversed(found) if best and event.get("step") == best["step"]), None)
    return last and _take(last, ("metric", "value", "former", "former_epoch", "gain", "noise", "samples"))


def _exports(manifest: Json, best: Json | None) -> Json | None:
    """The manifest, and whether it is of the best checkpoint that the run has now."""
    if not manifest:
        return None
    return {**manifest, "of_best": best is None or manifest["checkpoint"]["step"] == best["step"]}


def _rare_classes(events: list[Json]) -> Json | None:
    """Those with few training images: ``{num_classes, classes: {name: images}}``, the fewest; None: there are none."""
    found = [event for event in events if event.get("kind") == "rare_classes"]
    return _take(found[-1], ("num_classes", "classes")) if found else None


def _features(events: list[Json]) -> list[Json]:
    """What was kept of a frozen backbone: ``[{split, images, views, size_mb, place, seconds}]``, each split once."""
    fields = ("split", "images", "views", "size_mb", "place", "seconds")
    last = {event.get("split"): event for event in events if event.get("kind") == "features_kept"}
    return [{name: event.get(name) for name in fields} for event in last.values()]


def _measured(table: dict[str, Metric], best_val: Json, train: list[Json], val: list[Json], groups: list[str]) -> Json:
    """What each metric is, and its values."""
    fields = (*POSITION, *table)
    return {
        "metrics": {name: _shown_as(metric) for name, metric in table.items()},
        "best_val": _take(best_val, fields),
        "final_val": _take(val[-1], fields) if val else None,
        "curves": {
            "train": [_take(line, (*fields, *SPEED, *groups)) for line in train],
            "val": [_take(line, fields) for line in val],
        },
    }


def _shown_as(metric: Metric) -> Json:
    """What a reader of a metric's values has to know."""
    values = {key: getattr(metric, key) for key in ("title", "mode", "fraction", "charted")}
    return {**values, "own": metric.value is None}


def _without_trivial(metrics: list[Json]) -> list[Json]:
    """The lines, without what is the same for every model where there are so few classes."""
    hidden = {name for line in metrics for name in recipe_metrics.trivial_in(line)}
    return [line | {name: None for name in hidden if name in line} for line in metrics]


def _batch_sizes(run: RunDir, events: list[Json], missing: list[str]) -> Json | None:
    """What batch.size: auto measured, and where memory ran out later; None: neither."""
    tuned = _read_json(run.tuning, missing, "batch sizes that were measured") if run.tuning.exists() else {}
    ran_out = [_take(event, ("attempt", "step", "batch_sizes")) for event in events if event["kind"] == "out_of_memory"]
    return {"tuned": tuned or None, "out_of_memory": ran_out} if tuned or ran_out else None


def _bad_images(run: RunDir, missing: list[str]) -> Json | None:
    """What was left out because it cannot be decoded; None: the images were not looked through."""
    if not run.bad_images.exists():  # a run of an earlier version, or one that has not begun
        return None
    found = _read_json(run.bad_images, missing, "images that cannot be decoded")
    return _take(found, ("scanned", "leaked", "images"))


def _settings(values: Json, defaults: Json, prefix: str = "") -> list[Json]:
    """The recipe as rows ``{key, value, default}``; a mapping whose default is empty is a value, not a section."""
    rows: list[Json] = []
    for key, value in values.items():
        if isinstance(defaults[key], dict) and defaults[key]:
            rows += _settings(value, defaults[key], f"{prefix}{key}.")
        else:
            rows.append({"key": f"{prefix}{key}", "value": value, "default": defaults[key]})
    return rows


def _clean(value: Any) -> Any:
    """Plain JSON: string keys, lists, and None for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
