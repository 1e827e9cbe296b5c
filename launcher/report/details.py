"""What the report says beyond metrics: classes, single images, ranks, what happened when, commands; in plain words."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from launcher.report import environment
from launcher.tracking import wandb_folder

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir

Json = dict[str, Any]

FAULTS = (
    *("failure", "signal", "memory_kill", "out_of_memory", "node_lost", "node_joined", "regrouped", "rolled_back"),
    *("non_finite", "straggler", "checkpoint_failed", "checkpoint_rejected", "fewer_loaders", "data_wait", "refused"),
    *("preflight_failed", "quarantined", "recipe_changed", "code_changed", "user_code_changed", "cancelled"),
)
"""Kinds of events that the timeline shows beside the attempts."""
SHOWN_FACTS = ("parameters", "trainable_parameters", "train_images", "val_images", "torch", "precision")
"""Of the event facts, in the page's head."""
NUM_FAULTS = 200
"""Rows of the timeline, the first; of a run with more, events.jsonl has all."""
NUM_RANKS = 64
"""Ranks that the report lists, those that take longest; ranks.json has all."""


def of_run(
    run: RunDir, events: list[Json], train: list[Json], best_val: Json, best: Json | None, missing: list[str]
) -> Json:
    """All that this file finds of a run before the whole is known."""
    validated = validation(run, best, missing)
    found = validated or {}
    return {
        "facts": facts(events),
        "data_wait": data_wait(train),
        "class_rows": class_rows(validated, best_val.get("per_class")),
        "calibration": found.get("calibration"),
        "precision_recall": found.get("precision_recall"),
        "confusions": found.get("confusions", []),
        "images": {name: found.get(name, []) for name in ("wrong", "right")},
        "sample_batch": read_optional(run, run.sample_batch.name, missing),
        "ranks": ranks(run, events, missing),
        "faults": faults(events),
    }


def of_report(run: RunDir, report: Json, events: list[Json]) -> Json:
    """What is said of the whole."""
    return {
        "repeat": repeat(run, report),
        "environment": environment.of_run(run, report, events),
        "summary": summary(report),
    }


def read_optional(run: RunDir, name: str, missing: list[str]) -> Json | None:
    """A file of JSON that a run may have; None: it has none. What is damaged is told."""
    path = run.path / name
    try:
        return dict(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        missing.append(f"{name} is cut short or damaged")
        return None


def validation(run: RunDir, best: Json | None, missing: list[str]) -> Json | None:
    """What validation.json says; None where it is of another checkpoint than the best."""
    found = read_optional(run, run.validation.name, missing)
    return found if found and best and found.get("step") == best["step"] else None


def drawn_intervals(run: RunDir, best: Json | None) -> Json:
    """95 % intervals of what does not follow from metrics.jsonl; what is damaged is told elsewhere."""
    return dict((validation(run, best, []) or {}).get("intervals") or {})


def class_rows(validated: Json | None, per_class: Json | None) -> list[Json]:
    """Each class with its images and figures, in the order of the model's outputs."""
    known = validated["classes"] if validated else {}
    if not known:
        return [{"name": name, "train": None, **row} for name, row in (per_class or {}).items()]
    return [_class_row(name, row, (per_class or {}).get(name, {})) for name, row in known.items()]


def _class_row(name: str, row: Json, measured: Json) -> Json:
    hits, true, said = row["hits"], row["val"], row["predicted"]
    counted = {
        "recall": hits / true if true else None,
        "precision": hits / said if said else 0.0,
        "f1": 2 * hits / (true + said) if true + said else 0.0,
        "samples": true,
    }
    return {"name": name, "train": row["train"], **counted, **measured}


def ranks(run: RunDir, events: list[Json], missing: list[str]) -> Json | None:
    """The ranks' last times, those that take longest first; and which were ever named as slow. None: one rank."""
    found = read_optional(run, run.rank_times.name, missing)
    named = [event for event in events if event.get("kind") == "straggler"]
    if not found:
        return None
    rows = [
        {"rank": rank, "step_s": step, "compute_s": compute, "wait_s": wait}
        for rank, (step, compute, wait) in enumerate(
            zip(found["step_s"], found["compute_s"], found["wait_s"], strict=True)
        )
    ]
    rows.sort(key=lambda row: -(row["compute_s"] + row["wait_s"]))
    return {
        "step": found["step"],
        "num": len(rows),
        "slowest": found["slowest"],
        "rows": rows[:NUM_RANKS],
        "told": [event["message"] for event in named],
    }


def faults(events: list[Json]) -> list[Json]:
    """What disturbed or changed the run, oldest first."""
    rows = [
        {
            "time": event["time"],
            "kind": event["kind"],
            "attempt": event.get("attempt"),
            "where": " ".join(f"{key} {event[key]}" for key in ("node", "rank") if event.get(key) is not None),
            "step": event.get("step"),
            "message": _words(event),
        }
        for event in events
        if event.get("kind") in FAULTS
    ]
    return sorted(rows, key=lambda row: row["time"])[:NUM_FAULTS]


def _words(event: Json) -> str:
    text = event.get("message") or event.get("reason")
    if text:
        return str(text).splitlines()[0]
    known = ("time", "kind", "host", "attempt", "rank", "node", "step", "epoch")
    return ", ".join(f"{key} {json.dumps(value)[:80]}" for key, value in event.items() if key not in known)


def facts(events: list[Json]) -> Json | None:
    """What the last start of training said of model and data."""
    found = [event for event in events if event.get("kind") == "facts"]
    return {key: found[-1].get(key) for key in SHOWN_FACTS} if found else None


def data_wait(train: list[Json]) -> float | None:
    """Fraction of the time that training waited for images, in the mean over the images."""
    known = [(line["data_wait"], line.get("samples") or 1) for line in train if line.get("data_wait") is not None]
    total = sum(samples for _, samples in known)
    return sum(share * samples for share, samples in known) / total if total else None


def repeat(run: RunDir, report: Json) -> list[Json]:
    """Commands that do again what was done, and that use what came out."""
    folder = shlex.quote(str(run.path))
    rows = [
        (f"launch {shlex.quote(str(run.recipe))}", "train again, with every setting as it was"),
        (report["command"], "what was typed"),
        (f"launch evaluate {folder} --data PATH", "measure the best checkpoint on other images"),
        (f"launch predict {folder} IMAGE", "classify images"),
    ]
    if report["exports"]:
        rows.append((f"launch benchmark {folder}", "measure the exports' speed on this machine"))
    return [{"command": text, "why": why} for text, why in rows]


def next_commands(run: RunDir, state: str, best: Json | None, exports: Json | None) -> list[Json]:
    """What is worth doing next."""
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


def sync_command(run: RunDir, state: str, events: list[Json]) -> list[Json]:
    """The command that sends wandb's records; none while the run still writes them."""
    records = wandb_folder.unsynced(run, events) if state not in ("pending", "running") else []
    why = "send wandb's server what it has not got of this run"
    return [{"command": wandb_folder.sync_command(records), "why": why}] if records else []


def summary(report: Json) -> str:
    """The run in a paragraph for people who know nothing of training."""
    val, best, shown = report["best_val"] or {}, report["best"], report["class_rows"]
    num = len(report["classes"])
    kinds = f" into {num:,} classes" if num else ""
    if not best:
        return (
            f"A model that sorts images{kinds} was to be trained; nothing was validated yet (state: {report['state']})."
        )
    if val.get("top1") is not None and val.get("samples"):
        interval = report["intervals"].get("top1")
        sure = f" (with so few images, between {interval[0]:.1%} and {interval[1]:.1%} is likely)" if interval else ""
        text = f"The model sorts images{kinds}. Of {val['samples']:,} images that it was not trained on it names "
        text += f"{val['top1']:.1%} rightly{sure}."
    else:
        value = "unknown" if best["value"] is None else f"{best['value']:.4f}"
        text = f"The model sorts images{kinds}; its best {best['metric']} is {value}."
    known = [row for row in shown if row["recall"] is not None and row["samples"]]
    if len(known) > 1:
        top, low = max(known, key=lambda row: row["recall"]), min(known, key=lambda row: row["recall"])
        text += (
            f" Best known is “{top['name']}” ({top['recall']:.0%} found), worst “{low['name']}” ({low['recall']:.0%})."
        )
    return text + _accepted(report["exports"])


def _accepted(exports: Json | None) -> str:
    if not exports:
        return ""
    good = [row for row in exports["exports"] if row["accepted"]]
    if not good:
        return " None of its exports was accepted."
    fast = [row for row in good if row.get("latency_p50_ms")]
    text = f" {len(good)} of {len(exports['exports'])} exports can be used"
    if fast:
        one = min(fast, key=lambda row: row["latency_p50_ms"])
        text += f"; the fastest, {one['file']}, takes {one['latency_p50_ms']:.1f} ms an image on one CPU"
        text += f" and has {one['size_mb']:.1f} MB" if one.get("size_mb") else ""
    return text + "."
