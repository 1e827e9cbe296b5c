"""``launch benchmark``: how fast a run's exported files are on this machine, beside eager PyTorch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError
from launcher.system import phases
from launcher.system.cores import num_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = {
    "MB": ("size_mb", ".1f"),
    "load s": ("load_s", ".2f"),
    "p50 ms": ("latency_p50_ms", ".2f"),
    "p95 ms": ("latency_p95_ms", ".2f"),
    "p99 ms": ("latency_p99_ms", ".2f"),
    "images/s": ("throughput_images_per_s", ".1f"),
    "at batch": ("throughput_batch", "d"),
    "peak MB": ("peak_memory_mb", ".0f"),
}
"""Headers, each with its key and its format."""


def main(argv: Sequence[str]) -> int:
    """Run ``launch benchmark``; return its exit code."""
    parser = parser_of("benchmark", "Time exported models in turns on this machine's CPU, beside eager PyTorch.")
    parser.add_argument("place", metavar="RUN|FILE.onnx")
    parser.add_argument("--threads", type=int, default=num_cores(), metavar="N", help="of the CPU (all cores)")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    args = parser.parse_args(argv)
    if args.threads < 1:
        raise UsageError(f"--threads {args.threads}: give 1 or more")
    place = Path(args.place)
    if place.is_file() and place.suffix != ".onnx":
        raise UsageError(f"{place}: not an ONNX file; name one, or a run directory for its other formats")
    with phases.before_answer():
        phases.at("importing torch")
        from launcher.tools import benchmark

        found = benchmark.benchmark(place, threads=args.threads, warn=lambda line: print(line, file=sys.stderr))
    print(json.dumps(found, indent=2)) if args.as_json else _show(found)
    return EXIT_OK


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, rows = Console(), found["models"]
    heading = f"{found['cpu']}, {found['threads']} threads, images of {found['image_size']} px, the models in turn"
    console.print(heading, highlight=False)
    slowest = rows[0]["latency_p50_ms"]
    table = Table("model", *COLUMNS, "speed", padding=(0, 1, 0, 0))
    for row in rows:
        values = [row.get(key) for key, _ in COLUMNS.values()]
        forms = [form for _, form in COLUMNS.values()]
        cells = ["-" if value is None else format(value, form) for value, form in zip(values, forms, strict=True)]
        table.add_row(row["model"], *cells, f"{slowest / row['latency_p50_ms']:.2f}")
    console.print(table)
    console.print(f"speed: of one image at a time, by the median; {rows[0]['model']} is 1", highlight=False)
