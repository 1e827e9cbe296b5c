"""Where the time goes from the command to the first step: what a launch had spent when each part of it had ended.

    python -m tests.bench.startup_phases [--workers N]

CPU seconds (user and system) of the launching process, and then of rank 0's, with the wall clock beside them. The first
launch on a machine also tries the image size and makes the digits; run it twice.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
TERMINAL = os.dup(2)
"""Workers send what they print to their logs."""


def mark(began: float, name: str) -> None:
    """Print a line."""
    used = os.times()
    os.write(TERMINAL, f"{time.time() - began:8.2f} {used.user:8.2f} {used.system:8.2f}   {name}\n".encode())


def told(began: float, place: Any, name: str, what: str, *, only_once: bool = False) -> None:
    """Have a function print a line when it has ended, on rank 0."""
    function: Callable[..., Any] = getattr(place, name)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        found = function(*args, **options)
        if os.environ.get("RANK", "0") == "0":
            mark(began, what)
            if only_once:
                setattr(place, name, function)
        return found

    setattr(place, name, call)


def launch(began: float, arguments: list[str]) -> int:
    """A launch in this process whose parts say when they have ended."""
    from launcher import start
    from launcher.system import lazy_dynamo, lazy_meta, processes

    mark(began, "Python, launcher")
    told(began, start, "read", "recipe read and checked")
    told(began, start, "plan", "planned")
    told(began, start, "_look_through_images", "images looked through")
    told(began, start, "record", "run directory written")
    lazy_dynamo.put_off()
    lazy_meta.put_off()

    def wrap_engine() -> None:
        with processes.importing():
            import torch

            mark(began, "torch imported")
            from launcher.engine import optim, recipe_checks, setup, worker
            from launcher.engine.train_step import TrainStep

            mark(began, f"torchvision and the engine imported ({torch.__version__})")
        told(began, recipe_checks, "check", "recipe checked against the model")
        told(began, worker, "_join_group", "rank 0: forked, process group joined")
        told(began, setup, "build_model", "rank 0: model built")
        told(began, setup.Parts, "wrap", "rank 0: DDP")
        told(began, optim, "prepare_momentum", "rank 0: optimizer")
        told(began, TrainStep, "run", "rank 0: first batch, first step", only_once=True)

    checked = start._check_with_torch

    def check(draft: Any) -> None:
        wrap_engine()
        checked(draft)

    start._check_with_torch = check
    from launcher.cli import main

    return main(arguments)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse()
    if args.inside:
        sys.exit(launch(float(args.inside[0]), args.inside[1:]))
    print("    wall     user   system   when this had ended", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "train.epochs=1",
            "optim.warmup_epochs=0",
            "post.enabled=false",
            "data.workers=0",
            "tracking.wandb.mode=disabled",
        ]
        place = ["--procs", str(args.workers), "--run-dir", f"{folder}/run"]
        command = [sys.executable, "-m", "tests.bench.startup_phases", "--inside", str(time.time())]
        recipe = str(ROOT / "recipes/quickstart.yaml")
        subprocess.run([*command, recipe, *options, *place], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
