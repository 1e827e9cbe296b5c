"""The report as one HTML file that needs nothing else: no network, no script; for screens of any width, and paper."""

from __future__ import annotations

import json
from typing import Any

from launcher.images.folder import printable
from launcher.report.charts import Point, line_chart, thin
from launcher.report.markup import (
    Cell,
    css_class,
    duration,
    escape,
    html_table,
    metric,
    moment,
    num,
    section,
    show_number,
)
from launcher.report.style import STYLE
from launcher.system import cpu as host_cpu

Json = dict[str, Any]

MAX_HEAT_CLASSES = 30
MAX_RANKS = 64
MAX_BAD_IMAGES = 200


def render(report: Json) -> str:
    """The page, of what :func:`launcher.report.build.build_report` gives."""
    sections = (
        _headline(report),
        _notes(report),
        section("Curves", _curves(report)),
        section("Exports", _exports(report["exports"])),
        section("Classes", _classes(report)),
        section("Confusion matrix", _confusion(report)),
        section("Batch sizes", _batch_sizes(report["batch_sizes"])),
        section("Bad images", _bad_images(report["bad_images"])),
        section("Attempts", _attempts(report["attempts"])),
        section("Recipe", _recipe(report["settings"])),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report['run_id'])}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(report: Json) -> str:
    best, exports, state = report["best"], report["exports"], report["state"]
    css = {"completed": "good", "early_stopped": "good", "failed": "bad"}.get(state, "")
    workers = f"{report['world_size']} worker{'s' if report['world_size'] > 1 else ''} on {escape(report['device'])}"
    facts = []
    if best:
        where = f"after epoch {best['epoch'] + 1}, step {best['step']}"
        shown = report["metrics"].get(best["metric"].partition("/")[2], {"fraction": False})
        facts.append((f"best {escape(best['metric'])}", metric(best["value"], fraction=shown["fraction"]), where))
    else:
        facts.append(("best", "-", "no validation yet"))
    facts.append(("state", f'<span class="{css}">{escape(state.replace("_", " "))}</span>', ""))
    facts.append(("duration", duration(report["wall_s"]), f"training {duration(report['training_s'])}"))
    facts.append(("images/s", show_number(report["images_per_s"], "{:,.0f}"), f"median in training, {workers}"))
    if exports:
        accepted = sum(row["accepted"] for row in exports["exports"])
        facts.append(("exports accepted", f"{accepted} of {len(exports['exports'])}", ""))
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{value}{f'<small>{more}</small>' if more else ''}</dd></div>"
        for name, value, more in facts
    )
    nodes = f"{report['nodes']} node{'s' if report['nodes'] > 1 else ''}"
    return (
        f'<header>\n<h1>{escape(report["run_id"])}</h1>\n<p class="wide"><code>{escape(report["command"])}</code></p>\n'
        f'<p class="soft">{moment(report["created"])}, {escape(report["host"])}, {nodes}, {escape(report["backend"])}; '
        f'{escape(report["path"])}</p>\n<dl class="facts">{tiles}</dl>\n</header>'
    )


def _notes(report: Json) -> str:
    parts = [
        f'<div class="note" role="note"><strong>{escape(found["message"])}</strong><p>Likely cause: '
        f"{escape(found['cause'])}.</p></div>"
        for found in report["findings"]
    ]
    if report["missing"]:
        items = "".join(f"<li>{escape(line)}</li>" for line in report["missing"])
        parts.append(f'<div class="note" role="note"><strong>Missing in this report</strong><ul>{items}</ul></div>')
    if report["next"]:
        items = "".join(
            f"<li><code>{escape(row['command'])}</code> {escape(row['why'])}</li>" for row in report["next"]
        )
        parts.append(section("Next", f"<ul>{items}</ul>"))
    return "\n".join(parts)


def _curves(report: Json) -> str:
    metrics, val = report["metrics"], report["curves"]["val"]
    train = thin(report["curves"]["train"], [*metrics, "lr"])
    if not (train or val):
        return ""
    best_step = report["best"]["step"] if report["best"] else None
    charts = [
        line_chart(
            escape(found["title"][:1].upper() + found["title"][1:]),
            {"train": _points(train, key, show), "val": _points(val, key, show)},
            show,
            best_x=best_step,
        )
        for key, found in metrics.items()
        if found["charted"]
        for show in ("{:.2%}" if found["fraction"] else "{:.4g}",)
    ]
    charts.append(line_chart("Learning rate", {"train": _points(train, "lr", "{:.3g}")}, "{:.3g}", floor=0.0))
    smoothing = report["recipe"]["train"]["label_smoothing"]
    smoothed = f" and its loss includes label smoothing of {smoothing:g}" if smoothing else ""
    measured = {key: found for key, found in metrics.items() if any(line[key] is not None for line in val)}
    rows = [
        [
            (str(line["epoch"] + 1), "num"),
            num(line["step"], "{:,}"),
            *((metric(line[key], fraction=found["fraction"]), "num") for key, found in measured.items()),
        ]
        for line in val
    ]
    head = [(name, "num") for name in ("epoch", "step", *(escape(found["title"]) for found in measured.values()))]
    table = html_table("Validation after each epoch", head, rows)
    return (
        f'<div class="charts">{"".join(charts)}</div>\n<p class="soft">Training is measured on augmented images while '
        f"the weights move{smoothed}; validation after each epoch. A ring marks the best checkpoint.</p>\n"
        f"<details><summary>Validation as a table</summary>{table}</details>"
    )


def _points(lines: list[Json], key: str, show: str) -> list[Point]:
    return [
        (line["step"], line[key], f"step {line['step']:,}, epoch {line['epoch'] + 1}: {show_number(line[key], show)}")
        for line in lines
    ]


def _exports(exports: Json | None) -> str:
    if not exports:
        return "<p>None were made.</p>"
    reference, checkpoint = exports["reference"], exports["checkpoint"]

    def numbers(row: Json) -> list[Cell]:
        return [
            num(row["top1"], "{:.2%}"),
            num(row.get("top1_drop"), "{:+.2f}"),
            num(row.get("agreement"), "{:.2%}"),
            *(num(row[key], "{:.2f}") for key in ("size_mb", "latency_p50_ms", "latency_p95_ms")),
        ]

    rows = [
        [("the checkpoint", ""), ("reference", ""), (escape(reference["format"]), ""), *numbers(reference), ("", "")]
    ]
    for row in exports["exports"]:
        verdict = ("accepted", "good") if row["accepted"] else ("not accepted", "bad")
        why = ("" if row["accepted"] else escape(row["reason"]), "text")
        rows.append([(escape(row["file"]), ""), verdict, (escape(row["format"]), ""), *numbers(row), why])
    head = [("file", ""), ("verdict", ""), ("format", "")]
    head += [(name, "num") for name in ("top-1", "points lost", "agreement", "MB", "p50 ms", "p95 ms")]
    other = "" if exports["of_best"] else '<p class="bad">They are of another checkpoint than the best one.</p>'
    missing = exports.get("not_measured")
    measured = (
        f"not measured: {escape(missing)}" if missing else f"measured on {exports['val_samples']:,} validation images"
    )
    measured += "".join(f"; {row['file']} not made: {escape(row['reason'])}" for row in exports.get("not_made") or [])
    text = (
        f"Checkpoint of step {checkpoint['step']}; {measured}. "
        f"Agreement: the same class as the checkpoint. Times: one image at a time on the CPU{_threads(exports)}, the "
        "models in turn."
    )
    for row in exports["exports"]:
        if cpus := host_cpu.only_for(row.get("quantization")):
            text += f" {escape(row['file'])} is only for {cpus}: on other CPUs its answers are wrong."
    return f'{other}<p class="soft">{text}</p>' + html_table("Exported models", [*head, ("why not", "")], rows)


def _threads(exports: Json) -> str:
    found = exports.get("latency_threads")
    return f" ({found} thread{'s' if found > 1 else ''})" if found else ""


def _classes(report: Json) -> str:
    if not report["per_class"]:
        return ""
    rows = [
        [
            (escape(name), ""),
            *(num(row[key] if row["samples"] else None, "{:.1%}") for key in ("recall", "precision", "f1")),
            num(row["samples"], "{:,}"),
        ]
        for name, row in report["per_class"].items()
    ]
    head = [("class", ""), *((name, "num") for name in ("recall", "precision", "F1", "images"))]
    return html_table("Each class at the best checkpoint, on the validation images", head, rows)


def _confusion(report: Json) -> str:
    classes, matrix = report["classes"], report["confusion"]
    if not matrix and not report["mistakes"]:
        return ""
    mistakes = "".join(
        f"<li><q>{escape(row['true'])}</q> taken for <q>{escape(row['predicted'])}</q>: {row['count']}</li>"
        for row in report["mistakes"]
    )
    text = f"<p>Most frequent mistakes:</p><ul>{mistakes}</ul>" if mistakes else "<p>No mistakes.</p>"
    if not matrix:
        return text
    if len(classes) > MAX_HEAT_CLASSES:
        return f"{text}<p>The whole matrix of {len(classes)} classes is in report.json.</p>"
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{_heat_cells(counts, hit=index)}</tr>'
        for index, (name, counts) in enumerate(zip(classes, matrix, strict=True))
    )
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in classes)
    caption = "Rows: the true class; columns: what the model said; colour: share of the row"
    return (
        f'{text}<div class="scroll" role="region" tabindex="0" aria-label="Confusion matrix">\n<table class="heat">'
        f"<caption>{caption}</caption>\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>\n</div>"
    )


def _heat_cells(counts: list[int], *, hit: int) -> str:
    """A row of the matrix; at 0.55 of the colour the text keeps its contrast in the light and in the dark."""
    total = max(1, sum(counts))
    cells = []
    for index, count in enumerate(counts):
        css = "hit" if index == hit else "" if count else "soft"
        share = f"{0.55 * count / total:.2f}"
        cells.append(f'<td{css_class(css)} style="background:rgb(var(--heat)/{share})">{count}</td>')
    return "".join(cells)


def _batch_sizes(found: Json | None) -> str:
    if not found:
        return ""
    parts = []
    if found["tuned"]:
        batching, ranks = found["tuned"]["batching"], found["tuned"]["ranks"]
        total = sum(batching["shares"])
        dealt = list(zip(ranks, batching["batch_sizes"], batching["shares"], strict=True))
        rows = [
            [
                num(rank["rank"], "{}"),
                (escape(f"{rank['host']}: {rank['device']}"), ""),
                num(size, "{:,}"),
                num(share / total, "{:.1%}"),
                num(rank["images_per_s"], "{:,.0f}"),
                num(rank["needed_bytes"] / 1e9, "{:.2f}"),
                num(rank["budget_bytes"] / 1e9, "{:.2f}"),
            ]
            for rank, size, share in dealt[:MAX_RANKS]
        ]
        names = ("batch", "of a step", "images/s", "GB needed", "GB to take")
        head = [("rank", "num"), ("device", ""), *((name, "num") for name in names)]
        more = f" The first {MAX_RANKS} of {len(ranks)} ranks; tuning.json has all." if len(ranks) > MAX_RANKS else ""
        parts.append(html_table("Measured for batch.size: auto", head, rows))
        parts.append(f'<p class="soft">Global batch: {batching["global_batch_size"]:,}.{more}</p>')
    for event in found["out_of_memory"]:
        changes = ", ".join(f"rank {rank} from {old} to {new}" for rank, (old, new) in event["batch_sizes"].items())
        parts.append(
            f"<p>Memory ran out in step {event['step']:,}: smaller batches on {changes}. Nothing was lost.</p>"
        )
    return "".join(parts)


def _bad_images(found: Json | None) -> str:
    if not found:
        return ""
    leaked, images = found["leaked"], found["images"]
    text = f"{leaked:,} of the validation images are training images too, byte for byte: what is measured flatters."
    leaks = f"<p>{text}</p>" if leaked else ""
    if not images:
        return leaks
    rows = [
        [
            (escape(printable(row["path"])), ""),
            (escape(row["kind"].replace("_", " ")), ""),
            (escape(row["message"]), "text"),
        ]
        for row in images[:MAX_BAD_IMAGES]
    ]
    rest = "; the others are in bad_images.json" if len(images) > MAX_BAD_IMAGES else ""
    caption = f"{len(images):,} of {found['scanned']:,} images cannot be decoded and have no part in this{rest}"
    return leaks + html_table(caption, [("image", ""), ("kind", ""), ("found", "")], rows)


def _attempts(attempts: list[Json]) -> str:
    rows = []
    for row in attempts:
        begin = "the beginning" if row["resumed_step"] is None else f"step {row['resumed_step']:,}"
        why = escape(row["cause"].replace("_", " ")) + (f": {escape(row['message'])}" if row["message"] else "")
        rows.append(
            [
                (str(row["attempt"]), "num"),
                (moment(row["started"]), ""),
                (duration(row["duration_s"]), "num"),
                (begin, ""),
                num(row["last_step"], "{:,}"),
                (escape(", ".join(row["hosts"])), ""),
                (why, "text"),
            ]
        )
    head = [("attempt", "num"), ("started", ""), ("duration", "num"), ("from", ""), ("to step", "num"), ("hosts", "")]
    return html_table("Each start of the workers, and why it ended", [*head, ("ended", "")], rows) if rows else ""


def _recipe(settings: list[Json]) -> str:
    changed = [row for row in settings if row["value"] != row["default"]]

    def table(caption: str, rows: list[Json]) -> str:
        cells = [
            [
                (escape(row["key"]), ""),
                (f"<code>{escape(_setting(row['value']))}</code>", ""),
                (f"<code>{escape(_setting(row['default']))}</code>" if row in changed else "the default", "soft"),
            ]
            for row in rows
        ]
        return html_table(caption, [("setting", ""), ("value", ""), ("default", "")], cells)

    return (
        table("What differs from the defaults", changed)
        + f"<details><summary>All {len(settings)} settings</summary>{table('The resolved recipe', settings)}</details>"
    )


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
