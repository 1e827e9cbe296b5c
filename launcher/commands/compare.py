"""``launch compare``: runs side by side, with what differs between their recipes and what came of it."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from launcher.commands import compare_page
from launcher.commands import ps as jobs
from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError
from launcher.recipe import metrics as recipe_metrics
from launcher.report.build import AFTER_TRAINING
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.recipe.metrics import Mode

DEFAULT_METRIC = "val/top1"
ASIDE = ("launch", "tracking", "name")
"""Parts of a recipe that do not affect what is learned: they are shown only if nothing else differs."""
MIN_WIDTH = 12
"""Cut a value to this many characters at least; name the columns that have no room for that."""
NONE = "-"

Json = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Run ``launch compare``; return its exit code."""
    parser = parser_of("compare", "Put runs side by side: what differs in their recipes, and what came of it.")
    parser.add_argument("paths", nargs="+", metavar="RUN|FOLDER", help="run directories, or folders that hold some")
    parser.add_argument("--metric", metavar="M", help="what best means (default: what all watched, else val/top1)")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    shown.add_argument(
        "--html", nargs="?", const="comparison.html", metavar="FILE", help="a page with a picture (comparison.html)"
    )
    args = parser.parse_args(argv)
    run(args.paths, metric=args.metric, as_json=args.as_json, html=args.html)
    return EXIT_OK


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table."""

    header: str
    cells: list[str]
    kind: Literal["number", "word", "path", "setting", "export"] = "number"
    """Numbers stand at the right; a path or a setting may be cut, a setting or an export left out."""

    def width(self, cap: int) -> int:
        """Characters of its widest cell, where those that may be cut are cut to ``cap``."""
        widest = max(map(len, [self.header, *self.cells]))
        return min(widest, cap) if self.kind in ("path", "setting") else widest


def run(paths: Sequence[str], *, metric: str | None, as_json: bool, html: str | None = None) -> None:
    """Print the runs side by side, the best first; runs without a value come last.

    Args:
        paths: run directories, and folders that hold some.
        metric: what best means; None: what all runs watched, or val/top1 where they watched different things.
        as_json: print ``{metric, mode, keys, runs}``, whole, instead of a table.
        html: write a page to this file instead.

    Raises:
        UsageError: there is no run at one of the paths, no such metric, or the page cannot be written there.
    """
    if html is not None:
        compare_page.look(html)
    runs = _find(paths)
    recipes = [_recipe(run) for run in runs]
    modes = _modes(recipes)
    if metric is not None and metric not in modes:
        valid = f"--metric {metric}: no such metric; valid are {', '.join(modes)}"
        raise UsageError("; ".join(filter(None, [valid, recipe_metrics.nearest(metric, modes)])))
    metric = metric or _watched(recipes, modes)
    mode = modes[metric]
    rows = [_row(run, recipe, metric, mode) for run, recipe in zip(runs, recipes, strict=True)]
    sign = -1 if mode == "max" else 1
    rows.sort(key=lambda row: sign * row["best"]["value"] if row["best"] else math.inf)
    keys = _differing(recipes)
    if as_json:
        rows = [{**row, "recipe": {key: row["recipe"][key] for key in keys if key in row["recipe"]}} for row in rows]
        found = {"metric": metric, "mode": mode, "keys": keys, "runs": rows}
        print(json.dumps(found, indent=2, default=str))
        return
    marks = ["*" if row["best"] and row["best"]["value"] == rows[0]["best"]["value"] else "" for row in rows]
    notes = [f"* the best {metric} ({mode})" if any(marks) else f"no run has a {metric} yet"]
    if any(row["exports"] for row in rows):
        notes.append("exports: top-1 of those that were accepted; (old) of an earlier checkpoint than the best")
    columns = _columns(rows, keys, metric)
    if html is not None:
        table = [(column.header, column.kind in ("number", "export"), column.cells) for column in columns]
        compare_page.write(html, rows, table, keys=keys, metric=metric, marks=marks, notes=notes)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None  # a pipe gets whole cells
    _print_table([Column(header="", cells=marks), *columns], width)
    print("\n" + "\n".join(notes))


def _find(paths: Sequence[str]) -> list[RunDir]:
    """The runs in the order given, by name within a folder, each once."""
    found: dict[Path, RunDir] = {}
    problems = []
    for path in paths:
        try:
            runs = _runs_at(Path(path))
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
            continue
        if not runs:
            problems.append(f"{path}: {'a folder without a run' if Path(path).is_dir() else 'no such folder'}")
        found |= {run.path.resolve(): run for run in runs}
    if problems or not found:
        cure = "give run directories or folders with runs; `launch ps FOLDER` lists them, `launch RECIPE` makes them"
        raise UsageError("\n  ".join(["no run to compare", *problems, cure]))
    return list(found.values())


def _runs_at(path: Path) -> list[RunDir]:
    if not path.is_dir():
        return []
    runs = sorted(jobs.find_runs(path), key=lambda run: run.path)
    half_made = RunDir(path)
    return runs or [half_made] * (half_made.recipe.is_file() or half_made.plan.is_file())


# --- reading a run's files; any of them may be missing, cut short or damaged


def _object(path: Path) -> Json:
    """The object in a JSON file; an empty one where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _records(path: Path) -> list[Json]:
    """The whole lines of a ``.jsonl`` file."""
    try:
        return [record for record in read_jsonl(path) if isinstance(record, dict)]
    except (OSError, ValueError):
        return []


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _recipe(run: RunDir) -> Json:
    import yaml

    try:
        value = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
        return dict(_flat(value)) if isinstance(value, dict) else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def _flat(mapping: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _modes(recipes: Sequence[Json]) -> dict[str, Mode]:
    """The metrics that runs can be compared by, ours and the recipes' own, each with the mode that means better."""
    return recipe_metrics.watchable([row for recipe in recipes for row in recipe.get("metrics") or ()])


def _watched(recipes: Sequence[Json], modes: dict[str, Mode]) -> str:
    """The metric that all runs watched for early stopping, else val/top1."""
    metrics = {str(recipe.get("train.early_stopping.metric")) for recipe in recipes if recipe}
    metric = metrics.pop() if len(metrics) == 1 else DEFAULT_METRIC
    return metric if metric in modes else DEFAULT_METRIC


def _differing(recipes: Sequence[Json]) -> list[str]:
    """Keys whose value is not the same in all recipes that can be read, in the recipes' order."""
    known = [recipe for recipe in recipes if recipe]
    keys = [
        key
        for key in dict.fromkeys(key for recipe in known for key in recipe)
        if any((key in recipe, recipe.get(key)) != (key in known[0], known[0].get(key)) for recipe in known)
    ]
    return [key for key in keys if key.partition(".")[0] not in ASIDE] or keys


def _row(run: RunDir, recipe: Json, metric: str, mode: Mode) -> Json:
    """What the files of a run say; None, or nothing, where they do not. Epochs count from 0, times are seconds."""
    status, manifest, metrics = _object(run.status), _object(run.export_manifest), _records(run.metrics)
    rates = [line.get("images_per_s") for line in _curve(metrics, "train")]
    exports = _exports(manifest)
    return {
        "run": str(run),
        "state": str(status["state"]) if status.get("state") else None if run.status.exists() else "pending",
        "recipe": recipe,
        "best": _best(metric, mode, metrics, status),
        "images_per_s": statistics.median(known) if (known := list(filter(_is_number, rates))) else None,
        "training_s": _training_s([*_records(run.events), *metrics]),
        "exports": exports,
        "exports_of_best": _step(status, "best") in (None, _step(manifest, "checkpoint")) if exports else None,
    }


def _step(record: Json, key: str) -> Any:
    return record[key].get("step") if isinstance(record.get(key), dict) else None


def _curve(metrics: Sequence[Json], split: str) -> list[Json]:
    """One line per step, by step: after a crash and a resume steps come again, and the last line counts."""
    by_step = {line["step"]: line for line in metrics if line.get("split") == split and _is_number(line.get("step"))}
    return [by_step[step] for step in sorted(by_step)]


def _best(metric: str, mode: Mode, metrics: Sequence[Json], status: Json) -> Json | None:
    """The first of the best values; a mean over an epoch of training stands only in status.json, if it was watched."""
    split, _, name = metric.partition("/")
    if split == "val":
        shown = [line for line in _curve(metrics, split) if name not in recipe_metrics.trivial_in(line)]
        found = [{**line, "value": line.get(name)} for line in shown]
    else:
        watched = status.get("best")
        found = [watched] if isinstance(watched, dict) and watched.get("metric") == metric else []
    found = [{key: each.get(key) for key in ("value", "epoch", "step")} for each in found]
    whole = [each for each in found if all(map(_is_number, each.values()))]
    return (max if mode == "max" else min)(whole, key=lambda each: each["value"], default=None)


def _training_s(records: Sequence[Json]) -> float | None:
    """As in the report: of each attempt the seconds from its first to its last word."""
    times: dict[float, list[float]] = {}
    for record in records:
        attempt, time = record.get("attempt"), record.get("time")
        if _is_number(attempt) and _is_number(time) and record.get("kind") not in AFTER_TRAINING:
            times.setdefault(attempt, []).append(time)
    return sum(max(own) - min(own) for own in times.values()) if times else None


def _exports(manifest: Json) -> dict[str, float]:
    rows = manifest.get("exports")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {str(r.get("format")): r["top1"] for r in rows if r.get("accepted") is True and _is_number(r.get("top1"))}


# --- how it is shown


def _columns(rows: Sequence[Json], keys: Sequence[str], metric: str) -> list[Column]:
    formats = dict.fromkeys(name for row in rows for name in row["exports"])
    best = [row["best"] or {} for row in rows]
    return [
        Column(header="run", cells=[row["run"] for row in rows], kind="path"),
        Column(header="state", cells=[row["state"] or NONE for row in rows], kind="word"),
        *(Column(header=key, cells=[_setting(row["recipe"], key) for row in rows], kind="setting") for key in keys),
        Column(header=metric, cells=[_number(each.get("value"), ".4f") for each in best]),
        Column(header="epoch", cells=[f"{each['epoch'] + 1:g}" if each else NONE for each in best]),  # as in the logs
        Column(header="images/s", cells=[_number(row["images_per_s"], ".0f") for row in rows]),
        Column(header="time", cells=[_duration(row["training_s"]) for row in rows]),
        *(Column(header=name, cells=[_export(row, name) for row in rows], kind="export") for name in formats),
    ]


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    minutes, rest = divmod(round(seconds or 0), 60)
    return NONE if seconds is None else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _export(row: Json, name: str) -> str:
    old = name in row["exports"] and row["exports_of_best"] is False
    return _number(row["exports"].get(name), ".4f") + (" (old)" if old else "")


def _setting(recipe: Json, key: str) -> str:
    value = recipe.get(key, NONE)
    return " ".join((value if isinstance(value, str) else json.dumps(value, default=str)).split())


def _print_table(columns: Sequence[Column], width: int | None) -> None:
    """Print the columns, cut so that they fit into ``width``; a line names those that have no room at all."""
    shown, dropped = list(columns), list[str]()
    cap = max(len(cell) for column in columns for cell in [column.header, *column.cells])
    if width is not None:
        while _total(shown, MIN_WIDTH) > width and (spare := [c for c in shown if c.kind in ("setting", "export")]):
            victim = max(enumerate(spare), key=lambda each: (each[1].kind == "setting", each[0]))[1]
            shown.remove(victim)
            dropped.insert(0, victim.header)
        while cap > MIN_WIDTH and _total(shown, cap) > width:
            cap -= 1
    table = []
    for column in shown:
        cells = _cut([column.header, *column.cells], column.width(cap))
        adjust = str.rjust if column.kind in ("number", "export") else str.ljust
        table.append([adjust(cell, column.width(cap)) for cell in cells])
    for line in zip(*table, strict=True):
        print("  ".join(line).rstrip())
    if dropped:
        print(f"\nno room for {', '.join(dropped)}: a wider terminal or --json shows them")


def _total(columns: Sequence[Column], cap: int) -> int:
    return sum(column.width(cap) for column in columns) + 2 * (len(columns) - 1)


def _cut(cells: Sequence[str], width: int) -> list[str]:
    """Cut wide cells in the middle, or as near to it as keeps different cells different."""
    if max(map(len, cells)) <= width:
        return list(cells)
    ways = []
    for head in sorted(range(width), key=lambda head: abs(head - width // 2)):
        tail = width - 1 - head
        ways.append([c if len(c) <= width else f"{c[:head]}…{c[len(c) - tail :]}" for c in cells])
    return next((way for way in ways if len(set(way)) == len(set(cells))), ways[0])
