"""The report as one HTML file that needs nothing else: no network, no script; for screens of any width, and paper."""

from __future__ import annotations

import html
import json
import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Json = dict[str, Any]
Point = tuple[float, float | None, str]
"""x, y (None: not known, the line breaks) and what the pointer is told."""
Cell = tuple[str, str]
"""HTML, and a CSS class or an empty string."""

MAX_HEAT_CLASSES = 30
MAX_POINTS = 200
LOG_SPREAD = 50
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 250, 58, 10, 30, 36

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d5dae0;--panel:#f5f7f9;
--train:#1f6fb5;--val:#c2500a;--good:#1a7037;--bad:#b3261e;--heat:31 111 181}
@media(prefers-color-scheme:dark){:root{--bg:#14181d;--ink:#e4e8ec;--soft:#9aa5b1;--line:#333b45;--panel:#1d232a;
--train:#6cb2f0;--val:#ff9f5e;--good:#62c584;--bad:#ff8a80;--heat:80 150 220}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:75rem;padding:1.25rem 1rem 3rem;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:0}h2{font-size:1.15rem;margin:2.25rem 0 .6rem}
p{margin:.4rem 0;max-width:48rem}p.wide{max-width:none}.soft,caption,figcaption{color:var(--soft);font-size:.875rem}
code{font:.875em ui-monospace,monospace;background:var(--panel);padding:.1em .3em;border-radius:4px}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1.25rem 0}
dl.facts div{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
dt{color:var(--soft);font-size:.875rem}dd{margin:0}dl.facts dd{font-size:1.3rem;font-weight:600;line-height:1.3}
dd small{display:block;font-weight:400;font-size:.8rem;color:var(--soft)}
.good{color:var(--good)}.bad{color:var(--bad)}
.note{border-left:4px solid var(--val);background:var(--panel);padding:.5rem .9rem;margin:1rem 0}
ul{margin:.3rem 0;padding-left:1.2rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem}
figure{margin:0;max-width:38rem}figure h3{font-size:1rem;margin:0}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px}.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}.train{stroke:var(--train)}.val{stroke:var(--val)}
circle.train{fill:var(--train)}circle.val{fill:var(--val)}circle.best{fill:var(--bg);stroke-width:2.5}
circle.hit{fill:transparent;stroke:none}g:hover>circle.hit{fill:currentColor;fill-opacity:.2}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;overflow-wrap:normal}
caption{text-align:left;padding-bottom:.3rem}
th,td{padding:.3rem .65rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}tbody th{font-weight:500}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.text{min-width:20rem}
tbody td:not(.text),tbody th{white-space:nowrap}
.heat th,.heat td{padding:.2rem .4rem}.heat thead th{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left}
.heat thead td{border:0}.heat td{text-align:center;min-width:2.1rem;font-variant-numeric:tabular-nums}
.heat td.hit{font-weight:700}
details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
@media print{html{font-size:10px}body{max-width:none;padding:0;font-size:1rem}.scroll{overflow:visible}
.text{min-width:0}figure,tr,dl.facts div{break-inside:avoid}
h2{break-after:avoid}*{print-color-adjust:exact}details::details-content{content-visibility:visible;block-size:auto}}
"""


def render(report: Json) -> str:
    """The page, of what :func:`launcher.report.build_report` gives."""
    sections = (
        _headline(report),
        _notes(report),
        _section("Curves", _curves(report)),
        _section("Exports", _exports(report["exports"])),
        _section("Classes", _classes(report)),
        _section("Confusion matrix", _confusion(report)),
        _section("Attempts", _attempts(report["attempts"])),
        _section("Recipe", _recipe(report["settings"])),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(report['run_id'])}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _show(value: float | None, template: str) -> str:
    """A number by its format string, or a dash where it is not known."""
    return "-" if value is None else template.format(value)


def _metric(name: str, value: float | None) -> str:
    return _show(value, "{:.4f}" if name.endswith("loss") else "{:.2%}")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes else f"{seconds:.1f} s"


def _moment(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def _num(value: float | None, template: str) -> Cell:
    return _show(value, template), "num"


def _table(caption: str, head: Sequence[Cell], rows: Iterable[Sequence[Cell]], css: str = "") -> str:
    """A table that scrolls by itself, by keyboard too; the first cell of a row is its header. A cell's text is HTML."""

    def cell(tag: str, content: Cell, scope: str = "") -> str:
        return f"<{tag}{scope}{_class(content[1])}>{content[0]}</{tag}>"

    body = "\n".join(
        "<tr>" + cell("th", row[0], ' scope="row"') + "".join(cell("td", item) for item in row[1:]) + "</tr>"
        for row in rows
    )
    top = "".join(cell("th", item, ' scope="col"') for item in head)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">\n<table{_class(css)}>'
        f"<caption>{caption}</caption>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n</div>"
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _headline(report: Json) -> str:
    best, exports, state = report["best"], report["exports"], report["state"]
    css = {"completed": "good", "early_stopped": "good", "failed": "bad"}.get(state, "")
    workers = f"{report['world_size']} worker{'s' if report['world_size'] > 1 else ''} on {_text(report['device'])}"
    facts = []
    if best:
        where = f"after epoch {best['epoch'] + 1}, step {best['step']}"
        facts.append((f"best {_text(best['metric'])}", _metric(best["metric"], best["value"]), where))
    else:
        facts.append(("best", "-", "no validation yet"))
    facts.append(("state", f'<span class="{css}">{_text(state.replace("_", " "))}</span>', ""))
    facts.append(("duration", _duration(report["wall_s"]), f"training {_duration(report['training_s'])}"))
    facts.append(("images/s", _show(report["images_per_s"], "{:,.0f}"), f"median in training, {workers}"))
    if exports:
        accepted = sum(row["accepted"] for row in exports["exports"])
        facts.append(("exports accepted", f"{accepted} of {len(exports['exports'])}", ""))
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{value}{f'<small>{more}</small>' if more else ''}</dd></div>"
        for name, value, more in facts
    )
    nodes = f"{report['nodes']} node{'s' if report['nodes'] > 1 else ''}"
    return (
        f'<header>\n<h1>{_text(report["run_id"])}</h1>\n<p class="wide"><code>{_text(report["command"])}</code></p>\n'
        f'<p class="soft">{_moment(report["created"])}, {_text(report["host"])}, {nodes}, {_text(report["backend"])}; '
        f'{_text(report["path"])}</p>\n<dl class="facts">{tiles}</dl>\n</header>'
    )


def _notes(report: Json) -> str:
    parts = []
    if report["missing"]:
        items = "".join(f"<li>{_text(line)}</li>" for line in report["missing"])
        parts.append(f'<div class="note" role="note"><strong>Missing in this report</strong><ul>{items}</ul></div>')
    if report["next"]:
        items = "".join(f"<li><code>{_text(row['command'])}</code> {_text(row['why'])}</li>" for row in report["next"])
        parts.append(_section("Next", f"<ul>{items}</ul>"))
    return "\n".join(parts)


def _curves(report: Json) -> str:
    train, val = _thin(report["curves"]["train"]), report["curves"]["val"]
    if not (train or val):
        return ""
    best_step = report["best"]["step"] if report["best"] else None
    charts = [
        line_chart(title, {"train": _points(train, key, show), "val": _points(val, key, show)}, show, best_x=best_step)
        for title, key, show in (("Loss", "loss", "{:.4g}"), ("Top-1", "top1", "{:.2%}"))
    ]
    charts.append(line_chart("Learning rate", {"train": _points(train, "lr", "{:.3g}")}, "{:.3g}", floor=0.0))
    smoothing = report["recipe"]["train"]["label_smoothing"]
    smoothed = f" and its loss includes label smoothing of {smoothing:g}" if smoothing else ""
    rows = [
        [
            (str(line["epoch"] + 1), "num"),
            _num(line["step"], "{:,}"),
            _num(line["loss"], "{:.4f}"),
            *(_num(line[key], "{:.2%}") for key in ("top1", "top5", "f1")),
        ]
        for line in val
    ]
    head = [(name, "num") for name in ("epoch", "step", "loss", "top-1", "top-5", "F1")]
    table = _table("Validation after each epoch", head, rows)
    return (
        f'<div class="charts">{"".join(charts)}</div>\n<p class="soft">Training is measured on augmented images while '
        f"the weights move{smoothed}; validation after each epoch. A ring marks the best checkpoint.</p>\n"
        f"<details><summary>Validation as a table</summary>{table}</details>"
    )


def _thin(lines: list[Json]) -> list[Json]:
    """At most MAX_POINTS lines, each the mean of neighbours at the step of the last of them."""
    size = math.ceil(len(lines) / MAX_POINTS)
    if size <= 1:
        return lines
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    return [{**group[-1], **{key: _mean(group, key) for key in ("loss", "top1", "lr")}} for group in groups]


def _mean(lines: list[Json], key: str) -> float | None:
    values = [line[key] for line in lines if line[key] is not None]
    return sum(values) / len(values) if values else None


def _points(lines: list[Json], key: str, show: str) -> list[Point]:
    return [
        (line["step"], line[key], f"step {line['step']:,}, epoch {line['epoch'] + 1}: {_show(line[key], show)}")
        for line in lines
    ]


def line_chart(
    title: str,
    series: dict[str, list[Point]],
    show: str,
    *,
    best_x: float | None = None,
    floor: float = math.inf,
) -> str:
    """A figure of curves over optimizer steps, as inline SVG.

    Args:
        title: what y is.
        series: names (train or val, which are CSS classes too), each with its points.
        show: format string of a y, for the spoken summary.
        best_x: where a ring goes on the val curve; None: nowhere.
        floor: a value that the y axis reaches down to in any case.
    """
    series = {name: points for name, points in series.items() if any(y is not None for _, y, _ in points)}
    values = [y for points in series.values() for _, y, _ in points if y is not None]
    if not values:
        return ""
    logarithmic = min(values) > 0 and title == "Loss" and max(values) > LOG_SPREAD * min(values)
    ticks = _log_ticks(min(values), max(values)) if logarithmic else _ticks(min(*values, floor), max(values))
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    end = max(x for points in series.values() for x, _, _ in points) or 1
    low, high = scale(ticks[0]), scale(ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        down = (high - scale(y)) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * x / end, TOP + (HEIGHT - TOP - BOTTOM) * down

    parts = [_axes(ticks, end, place, percent="%" in show)]
    parts += [_series(name, points, place, best_x) for name, points in series.items()]
    if len(series) > 1:
        parts.append(_legend(list(series)))
    known = {name: [y for _, y, _ in points if y is not None] for name, points in series.items()}
    spoken = "; ".join(
        f"{name} from {show.format(ys[0])} to {show.format(ys[-1])}, lowest {show.format(min(ys))}, "
        f"highest {show.format(max(ys))}"
        for name, ys in known.items()
    )
    label = f"{title} over {end:,} optimizer steps: {spoken}"
    head = f"{title} (logarithmic)" if logarithmic else title
    return (
        f'<figure><h3>{head}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(label)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most ``low`` to at least ``high``."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _axes(
    ticks: list[float], end: float, place: Callable[[float, float], tuple[float, float]], *, percent: bool
) -> str:
    parts = []
    for tick in ticks:
        x, y = place(0, tick)
        text = f"{tick * 100:.4g}%" if percent else f"{tick:.4g}"
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for tick in (tick for tick in _ticks(0, end, 4) if tick <= end and tick == int(tick)):
        x, y = place(tick, ticks[0])
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 5:.1f}"/>'
            f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:,.0f}</text>'
        )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">optimizer steps</text>')
    return "".join(parts)


def _series(
    name: str, points: list[Point], place: Callable[[float, float], tuple[float, float]], best_x: float | None
) -> str:
    path, marks, pen = [], [], "M"
    for x, y, tip in points:
        if y is None:
            pen = "M"
            continue
        left, top = place(x, y)
        path.append(f"{pen}{left:.1f} {top:.1f}")
        pen = "L"
        at = f'cx="{left:.1f}" cy="{top:.1f}"'
        best = name == "val" and x == best_x
        css, radius = (f"{name} best", 5) if best else (name, 3 if name == "val" else 1.5)
        more = " (best checkpoint)" if best else ""
        marks.append(
            f'<g><title>{name}, {_text(tip)}{more}</title><circle class="{css}" {at} r="{radius}"/>'
            f'<circle class="hit" {at} r="7"/></g>'
        )
    return f'<path class="curve {name}" d="{"".join(path)}"/>{"".join(marks)}'


def _legend(names: list[str]) -> str:
    return "".join(
        f'<line class="curve {name}" x1="{LEFT + 80 * i}" x2="{LEFT + 80 * i + 22}" y1="14" y2="14"/>'
        f'<text x="{LEFT + 80 * i + 28}" y="18">{name}</text>'
        for i, name in enumerate(names)
    )


def _exports(exports: Json | None) -> str:
    if not exports:
        return "<p>None were made.</p>"
    reference, checkpoint = exports["reference"], exports["checkpoint"]

    def numbers(row: Json) -> list[Cell]:
        return [
            _num(row["top1"], "{:.2%}"),
            _num(row.get("top1_drop"), "{:+.2f}"),
            _num(row.get("agreement"), "{:.2%}"),
            *(_num(row[key], "{:.2f}") for key in ("size_mb", "latency_p50_ms", "latency_p95_ms")),
        ]

    rows = [
        [("the checkpoint", ""), ("reference", ""), (_text(reference["format"]), ""), *numbers(reference), ("", "")]
    ]
    for row in exports["exports"]:
        verdict = ("accepted", "good") if row["accepted"] else ("not accepted", "bad")
        why = ("" if row["accepted"] else _text(row["reason"]), "text")
        rows.append([(_text(row["file"]), ""), verdict, (_text(row["format"]), ""), *numbers(row), why])
    head = [("file", ""), ("verdict", ""), ("format", "")]
    head += [(name, "num") for name in ("top-1", "points lost", "agreement", "MB", "p50 ms", "p95 ms")]
    other = "" if exports["of_best"] else '<p class="bad">They are of another checkpoint than the best one.</p>'
    text = (
        f"Checkpoint of step {checkpoint['step']}; measured on {exports['val_samples']:,} validation images. "
        "Agreement: the same class as the checkpoint. Times: one image at a time on the CPU."
    )
    return f'{other}<p class="soft">{text}</p>' + _table("Exported models", [*head, ("why not", "")], rows)


def _classes(report: Json) -> str:
    if not report["per_class"]:
        return ""
    rows = [
        [
            (_text(name), ""),
            *(_num(row[key], "{:.1%}") for key in ("recall", "precision", "f1")),
            _num(row["samples"], "{:,}"),
        ]
        for name, row in report["per_class"].items()
    ]
    head = [("class", ""), *((name, "num") for name in ("recall", "precision", "F1", "images"))]
    return _table("Each class at the best checkpoint, on the validation images", head, rows)


def _confusion(report: Json) -> str:
    classes, matrix = report["classes"], report["confusion"]
    if not matrix:
        return ""
    mistakes = "".join(
        f"<li><q>{_text(row['true'])}</q> taken for <q>{_text(row['predicted'])}</q>: {row['count']}</li>"
        for row in report["mistakes"]
    )
    text = f"<p>Most frequent mistakes:</p><ul>{mistakes}</ul>" if mistakes else "<p>No mistakes.</p>"
    if len(classes) > MAX_HEAT_CLASSES:
        return f"{text}<p>The whole matrix of {len(classes)} classes is in report.json.</p>"
    rows = "\n".join(
        f'<tr><th scope="row">{_text(name)}</th>{_heat_cells(counts, hit=index)}</tr>'
        for index, (name, counts) in enumerate(zip(classes, matrix, strict=True))
    )
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in classes)
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
        cells.append(f'<td{_class(css)} style="background:rgb(var(--heat)/{share})">{count}</td>')
    return "".join(cells)


def _attempts(attempts: list[Json]) -> str:
    rows = []
    for row in attempts:
        begin = "the beginning" if row["resumed_step"] is None else f"step {row['resumed_step']:,}"
        why = _text(row["cause"].replace("_", " ")) + (f": {_text(row['message'])}" if row["message"] else "")
        rows.append(
            [
                (str(row["attempt"]), "num"),
                (_moment(row["started"]), ""),
                (_duration(row["duration_s"]), "num"),
                (begin, ""),
                _num(row["last_step"], "{:,}"),
                (_text(", ".join(row["hosts"])), ""),
                (why, "text"),
            ]
        )
    head = [("attempt", "num"), ("started", ""), ("duration", "num"), ("from", ""), ("to step", "num"), ("hosts", "")]
    return _table("Each start of the workers, and why it ended", [*head, ("ended", "")], rows) if rows else ""


def _recipe(settings: list[Json]) -> str:
    changed = [row for row in settings if row["value"] != row["default"]]

    def table(caption: str, rows: list[Json]) -> str:
        cells = [
            [
                (_text(row["key"]), ""),
                (f"<code>{_text(_setting(row['value']))}</code>", ""),
                (f"<code>{_text(_setting(row['default']))}</code>" if row in changed else "the default", "soft"),
            ]
            for row in rows
        ]
        return _table(caption, [("setting", ""), ("value", ""), ("default", "")], cells)

    return (
        table("What differs from the defaults", changed)
        + f"<details><summary>All {len(settings)} settings</summary>{table('The resolved recipe', settings)}</details>"
    )


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
