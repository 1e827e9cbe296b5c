"""``launch models``: which architectures and weights a recipe can name, and which layers of one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError, did_you_mean
from launcher.recipe import catalog

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from launcher.recipe.catalog import ModelEntry, WeightsEntry

SORTED: dict[str, Callable[[WeightsEntry], float]] = {
    "params": lambda one: one.num_params,
    "gflops": lambda one: one.gflops,
    "top1": lambda one: -(one.top1 or 0),
    "size": lambda one: one.file_size_mb,
}
"""What weights can be sorted by."""
_PIPE_WIDTH = 120  # rich takes a pipe for 80 columns wide, and would break the names that people grep for


def main(argv: Sequence[str]) -> int:
    """Run ``launch models``; return its exit code."""
    parser = parser_of("models", "List torchvision's classification models.")
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="part of a name, or a glob: 'resnet*'")
    parser.add_argument("--layers", metavar="ARCH", help="show the layer names that freeze and groups match")
    parser.add_argument("--sort", choices=SORTED, help="by that, the best or smallest first")
    parser.add_argument("--max-params", type=float, metavar="M", help="at most so many million parameters")
    parser.add_argument("--max-gflops", type=float, metavar="G", help="at most so many GFLOPs an image")
    parser.add_argument("--min-top1", type=float, metavar="T", help="at least that top-1, as in 0.75")
    parser.add_argument("--max-mb", type=float, metavar="MB", help="a file of at most so many MB")
    parser.add_argument("--cached", action="store_true", help="whose weights are on this machine already")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    args = parser.parse_args(argv)
    if args.layers is not None:
        run_layers(args.pattern, args.layers)
        return EXIT_OK
    rows = _rows(args)
    if args.as_json:
        print(json.dumps([{"arch": row.arch, **_facts(row)} for row in rows], indent=2))
        return EXIT_OK
    _print(_model_table(rows))
    print(
        "\n* what `weights: DEFAULT` takes; `launch models --layers ARCH` prints what freeze and groups can name; "
        "cached: in torch's cache here"
    )
    return EXIT_OK


@dataclass(frozen=True, kw_only=True)
class Row:
    """Weights of a model; or a model that has none."""

    arch: str
    """Its name."""
    is_default: bool
    """Whether `weights: DEFAULT` takes them."""
    weights: WeightsEntry | None
    """None: there are none."""
    is_cached: bool
    """Whether they are on this machine."""


def _rows(args: argparse.Namespace) -> list[Row]:
    """The models that match, each with its weights, filtered and sorted.

    Raises:
        UsageError: nothing is left.
    """
    folder = catalog.weights_folder()
    rows = [
        Row(
            arch=model.arch,
            is_default=weights is None or weights.name == model.default,
            weights=weights,
            is_cached=weights is not None and (folder / weights.file_name).is_file(),
        )
        for model in _select(args.pattern)
        for weights in model.weights or (None,)
    ]
    tests: dict[str, Callable[[WeightsEntry], bool]] = {
        "max_params": lambda one: one.num_params <= args.max_params * 1e6,
        "max_gflops": lambda one: one.gflops <= args.max_gflops,
        "min_top1": lambda one: (one.top1 or 0) >= args.min_top1,
        "max_mb": lambda one: one.file_size_mb <= args.max_mb,
    }
    wanted = [test for name, test in tests.items() if getattr(args, name) is not None]
    if wanted or args.sort:
        rows = [row for row in rows if row.weights and all(test(row.weights) for test in wanted)]
    if args.cached:
        rows = [row for row in rows if row.is_cached]
    if not rows:
        raise UsageError("no model is like that; leave out one of the conditions (`launch models` lists all)")
    key = SORTED.get(args.sort)
    return sorted(rows, key=lambda row: key(row.weights) if row.weights else 0.0) if key else rows


def _facts(row: Row) -> dict[str, Any]:
    """What is known of weights, for programs."""
    known = asdict(row.weights) if row.weights else {"name": None}
    return {**known, "default": row.is_default and row.weights is not None, "cached": row.is_cached}


def run_layers(pattern: str | None, layers: str) -> None:
    """Print the layers of a model, which ``model.freeze``, ``model.unfreeze`` and ``optim.groups`` can name.

    Raises:
        UsageError: there is no such model, or a pattern is given, too.
    """
    if pattern is None:
        _print_layers(catalog.find_model(layers).arch)
    else:
        raise UsageError(f"found the pattern {pattern!r} and --layers {layers}; give one or the other")


def _select(pattern: str | None) -> list[ModelEntry]:
    models = catalog.classification_models()
    if pattern is None:
        return list(models.values())
    wanted = pattern.lower()
    glob = wanted if any(char in wanted for char in "*?[") else f"*{wanted}*"
    found = [entry for arch, entry in models.items() if fnmatchcase(arch, glob)]
    if not found:
        problem = f"found {pattern!r}, which matches none of torchvision's {len(models)} classification models;"
        hint = did_you_mean(wanted, models)
        raise UsageError(" ".join(filter(None, [problem, hint, "`launch models` lists them"])))
    return found


def _model_table(rows: list[Row]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arch")
    table.add_column("weights")
    for header in ("top-1", "params (M)", "GFLOPs", "image size", "file (MB)"):
        table.add_column(header, justify="right")
    table.add_column("")
    for row in rows:
        weights = row.weights
        if weights is None:
            table.add_row(row.arch, "-", "-", "-", "-", "-", "-")
            continue
        table.add_row(
            row.arch,
            f"{weights.name} *" if row.is_default else weights.name,
            "-" if weights.top1 is None else f"{weights.top1:.3f}",
            f"{weights.num_params / 1e6:.1f}",
            f"{weights.gflops:.2f}",
            str(weights.image_size),
            f"{weights.file_size_mb:.0f}",
            "cached" if row.is_cached else "",
            style=None if row.is_default else "dim",
        )
    return table


def _print_layers(arch: str) -> None:
    from rich.table import Table

    from launcher.engine import layers  # only this table pays for torch

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer")
    table.add_column("type")
    table.add_column("parameters", justify="right")
    table.add_column("")
    rows = layers.describe_layers(arch)
    for row in rows:
        table.add_row(f"{'  ' * row.depth}{row.name}", row.kind, f"{row.num_params:,}", "head" if row.is_head else "")
    _print(table)
    total = sum(row.num_params for row in rows if row.depth == 0)
    print(f"\n{arch}: {total:,} parameters with {layers.DESCRIBED_CLASSES:,} classes")
    print("A name selects everything beneath it, and may be a glob (layer[12], *.bn1); deeper names work as well.")
    print(f"`head` is {', '.join(layers.head_modules(arch))}; `backbone` is all but the head; `*` is all.")


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(renderable)
