"""``launch models``: which architectures and weights a recipe can name, and which layers of one."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError, did_you_mean
from launcher.recipe import catalog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from launcher.recipe.catalog import ModelEntry

_PIPE_WIDTH = 120  # rich takes a pipe for 80 columns wide, and would break the names that people grep for


def main(argv: Sequence[str]) -> int:
    """Run ``launch models``; return its exit code."""
    parser = parser_of("models", "List torchvision's classification models.")
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="part of a name, or a glob: 'resnet*'")
    parser.add_argument("--layers", metavar="ARCH", help="show the layer names that freeze and groups match")
    args = parser.parse_args(argv)
    run(args.pattern, args.layers)
    return EXIT_OK


def run(pattern: str | None, layers: str | None) -> None:
    """Print the models that match, or the layers of one.

    Args:
        pattern: part of a name, or a glob over whole names; upper and lower case are the same. None: all.
        layers: the architecture whose layers ``model.freeze``, ``model.unfreeze`` and ``optim.groups`` can name.

    Raises:
        UsageError: nothing matches, or both are given.
    """
    if layers is None:
        _print(_model_table(_select(pattern)))
        print("\n* what `weights: DEFAULT` takes; `launch models --layers ARCH` prints what freeze and groups can name")
    elif pattern is None:
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


def _model_table(models: list[ModelEntry]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arch")
    table.add_column("weights")
    for header in ("top-1", "params (M)", "GFLOPs", "image size", "file (MB)"):
        table.add_column(header, justify="right")
    for model in models:
        for weights in model.weights:
            default = weights.name == model.default
            table.add_row(
                model.arch,
                f"{weights.name} *" if default else weights.name,
                "-" if weights.top1 is None else f"{weights.top1:.3f}",
                f"{weights.num_params / 1e6:.1f}",
                f"{weights.gflops:.2f}",
                str(weights.image_size),
                f"{weights.file_size_mb:.0f}",
                style=None if default else "dim",
            )
        if not model.weights:
            table.add_row(model.arch, "-", "-", "-", "-", "-", "-")
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
