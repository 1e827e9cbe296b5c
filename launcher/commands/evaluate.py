"""``launch evaluate``: what a run's best checkpoint measures on labelled images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError
from launcher.recipe import given
from launcher.runs.run_dir import RunDir
from launcher.system import phases

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.recipe.metrics import Metric


def main(argv: Sequence[str]) -> int:
    """Run ``launch evaluate``; return its exit code."""
    parser = parser_of("evaluate", "Measure a run's best checkpoint on its validation images, or on others.")
    parser.add_argument("run_dir", metavar="RUN")
    help_ = "what a list of --data calls its columns: 'data.columns={path: file, label: breed}'"
    parser.add_argument("overrides", metavar="data.columns=…", nargs="*", help=help_)
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--data", metavar="FOLDER", help="labelled images: FOLDER/CLASS/*.jpg, or a list of them")
    images.add_argument("--split", default="val", metavar="NAME", help="of the run's images (val)")
    parser.add_argument("--tta", action="store_true", help="each image and its mirror image: the mean of their logits")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    args = parser.parse_intermixed_args(argv)
    run, columns = RunDir.existing(args.run_dir), _columns(args.overrides, args.data)
    from launcher.recipe import load as recipes
    from launcher.recipe import metrics as recipe_metrics
    from launcher.report import intervals

    with phases.before_answer():
        phases.at("importing torch")
        from launcher.tools import score

        folder = Path(args.data) if args.data else None
        found = score.score(run, folder=folder, columns=columns, split=args.split, mirrored=args.tta)
    table = recipe_metrics.of(recipes.to_dict(recipes.read_resolved(run.recipe))["metrics"])
    found = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in found.items()
    }
    found["intervals"] |= intervals.of_validation(found, table)
    print(json.dumps(found, indent=2)) if args.as_json else _show(run, found, table)
    return EXIT_OK


def _columns(overrides: Sequence[str], data: str | None) -> dict[str, str] | None:
    """Of a list that is named by ``--data``; None: they have the names that the run's recipe says."""
    if not overrides:
        return None
    if other := [item for item in overrides if not item.startswith("data.columns=") or not data]:
        raise UsageError(
            f"{other[0]}: a checkpoint is measured as its run says; only data.columns of a list that --data "
            "names may be another"
        )
    return given.recipe_of(overrides).data.columns


def _show(run: RunDir, found: dict[str, Any], table: dict[str, Metric]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    samples, num_classes = found["samples"], len(found.get("per_class") or ())
    console.print(f"{run}: {samples} images of {found['images']}, computed in {found['computed_in']}", highlight=False)
    if found["differs"]:
        console.print(
            f"  {found['differs']}: the run's own figures may differ by rounding", highlight=False, soft_wrap=True
        )
    shown = {name: metric for name, metric in table.items() if found.get(name) is not None}
    width, known = max(24, *(len(metric.title) for metric in shown.values())), found["intervals"]
    for name, metric in shown.items():
        if num_classes and num_classes <= metric.more_classes_than:
            continue
        notes = [f"95 % interval {known[name][0]:.4f} to {known[name][1]:.4f}"] if name in known else []
        notes += [f"from {found['ranking']}"] if metric.ranked and found["ranking"] != "exact" else []
        note = f"  ({'; '.join(notes)})" if notes else ""
        console.print(f"  {metric.title:<{width}} {found[name]:.4f}{note}", highlight=False)
    if found.get("ece_calibrated") is not None:
        note = f"(of the probabilities that predictions show: temperature {found['temperature']:.3f})"
        console.print(f"  {'ECE, calibrated':<{width}} {found['ece_calibrated']:.4f}  {note}", highlight=False)
    if not num_classes:
        return
    rows = Table("class", "recall", "precision", "F1", "images")
    for name, row in found["per_class"].items():
        cells = [f"{row[key]:.4f}" if row["samples"] else "-" for key in ("recall", "precision", "f1")]
        rows.add_row(name, *cells, str(row["samples"]))
    console.print(rows)
