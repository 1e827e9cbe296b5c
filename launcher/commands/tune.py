"""``launch tune RECIPE``: what batch sizes cost on this machine, measured as a run with ``batch.size: auto`` does."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import start
from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK
from launcher.plan.request import Request
from launcher.runs.run_dir import RunDir
from launcher.system import console

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``launch tune``; return its exit code."""
    parser = parser_of("tune", "Measure which batch size is best on this machine; nothing is trained.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one that `launch recipes` lists")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change the recipe: data.image_size=160")
    parser.add_argument("--gpus", type=int, metavar="M", help="GPUs, one worker each")
    parser.add_argument("--procs", type=int, metavar="P", help="workers, on whatever device the recipe names")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    args = parser.parse_intermixed_args(argv)
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Measure in a run directory that is thrown away, and print a table for each rank."""
    console.protect()
    with tempfile.TemporaryDirectory(prefix="launch-tune-") as folder:
        request = Request(
            recipe=args.recipe,
            overrides=(*args.overrides, "batch.size=auto"),
            nodes=1,
            spares=0,
            gpus=args.gpus,
            procs=args.procs,
            backend="torchrun",
            run_dir=str(Path(folder) / "run"),
            tune=True,
        )
        (reading,) = start.read(request)
        with _output_to_stderr() if args.as_json else contextlib.nullcontext():
            code = start.carry_out(reading)
        console.release()
        if code == EXIT_OK:
            found = json.loads(RunDir(Path(folder) / "run").tuning.read_text(encoding="utf-8"))
            print(json.dumps(found, indent=2)) if args.as_json else _show(found)
    return code


@contextlib.contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Keep what is said meanwhile, by other processes too, out of what a program reads."""
    console.drain()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        console.drain()
        os.dup2(kept, 1)
        os.close(kept)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    terminal = Console(highlight=False)
    batching = found["batching"]
    for rank in found["ranks"]:
        title = f"rank {rank['rank']} on {rank['host']}: {rank['device']}, {rank['budget_bytes'] / 1e9:.2f} GB to take "
        terminal.print(f"{title}({rank['limit']}); measured in {rank['seconds']:.0f} s", soft_wrap=True)
        table = Table("batch", "images/s", "memory", "")
        for row in rank["attempts"]:
            chosen = "best" if row["batch_size"] == rank["batch_size"] else ""
            table.add_row(
                str(row["batch_size"]),
                f"{row['images_per_s']:.1f}" if row["images_per_s"] else "-",
                f"{row['needed_bytes'] / 1e9:.2f} GB" if row["needed_bytes"] else "-",
                row["problem"] or chosen,
            )
        terminal.print(table)
    sizes, total = batching["batch_sizes"], sum(batching["shares"])
    for rank, size, share in zip(found["ranks"], sizes, batching["shares"], strict=True):
        host = f"{rank['threads']} CPU threads, {rank['workers']} loader processes"
        terminal.print(f"rank {rank['rank']}: batch {size}, {share / total:.1%} of every step, {host}")
    terminal.print(f"global batch: {batching['global_batch_size']}")
    if len(set(sizes)) == 1:
        terminal.print(f"to fix it: batch.size={sizes[0]}")
