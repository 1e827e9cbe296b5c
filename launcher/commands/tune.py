"""``launch tune RECIPE``: what batch sizes cost on this machine, measured as a run with ``batch.size: auto`` does."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import processes
from launcher.commands import launch
from launcher.errors import EXIT_OK
from launcher.run_dir import RunDir, new_run_id

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


def run(args: argparse.Namespace) -> int:
    """Measure in a run directory that is thrown away, and print a table for each rank."""
    given = vars(args) | {"nodes": None, "profile": None, "kept_profile": None, "profile_overrides": []}
    given |= {"backend": "torchrun", "node_rank": 0, "rdzv_endpoint": None, "detach": False, "debug": False}
    given |= {"dry_run": False, "tune": True}
    with processes.importing():
        from launcher import recipe as recipes
    with tempfile.TemporaryDirectory(prefix="launch-tune-") as folder:
        given["run_dir"] = str(Path(folder) / "run")
        for name, value in given.items():
            setattr(args, name, value)
        overrides = [*args.overrides, "batch.size=auto"]
        recipe, source = recipes.load(launch.find_recipe(args.recipe), overrides, launch.flags(args))
        with _output_to_stderr() if args.as_json else contextlib.nullcontext():
            code = launch.carry_out(recipe, source, args, run_id=new_run_id(recipe.name))
        if code == EXIT_OK:
            found = json.loads(RunDir(args.run_dir).tuning.read_text(encoding="utf-8"))
            print(json.dumps(found, indent=2)) if args.as_json else _show(found)
    return code


@contextlib.contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Keep what is said meanwhile, by other processes too, out of what a program reads."""
    import os

    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    batching = found["batching"]
    for rank in found["ranks"]:
        title = f"rank {rank['rank']} on {rank['host']}: {rank['device']}, {rank['budget_bytes'] / 1e9:.2f} GB to take "
        console.print(f"{title}({rank['limit']}); measured in {rank['seconds']:.0f} s", soft_wrap=True)
        table = Table("batch", "images/s", "memory", "")
        for row in rank["attempts"]:
            chosen = "best" if row["batch_size"] == rank["batch_size"] else ""
            table.add_row(
                str(row["batch_size"]),
                f"{row['images_per_s']:.1f}" if row["images_per_s"] else "-",
                f"{row['needed_bytes'] / 1e9:.2f} GB" if row["needed_bytes"] else "-",
                row["problem"] or chosen,
            )
        console.print(table)
    sizes, total = batching["batch_sizes"], sum(batching["shares"])
    for rank, size, share in zip(found["ranks"], sizes, batching["shares"], strict=True):
        host = f"{rank['threads']} CPU threads, {rank['workers']} loader processes"
        console.print(f"rank {rank['rank']}: batch {size}, {share / total:.1%} of every step, {host}")
    console.print(f"global batch: {batching['global_batch_size']}")
    if len(set(sizes)) == 1:
        console.print(f"to fix it: batch.size={sizes[0]}")
