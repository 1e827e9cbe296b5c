"""How long until something happens, against the tools people use now: both sides in turn in one run, ratios printed.

    python -m tests.bench.startup [--repeats N] [--workers 2 8]

1. From the command to the first optimizer step: ``launch`` (recipe, checks, real images, one import of torch a node)
   against ``torchrun`` with the smallest DDP script that trains the same network on random numbers (torchrun_ddp.py).
2. ``launch --help`` against ``torchx --help``, where torchx is installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.runs.history import events
from launcher.runs.run_dir import RunDir

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def launch_first_step(workers: int) -> float:
    """Seconds from starting `launch` to its first optimizer step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = ["train.epochs=2", "post.enabled=false", "data.workers=0", "tracking.wandb.mode=disabled"]
        start = time.time()
        subprocess.run(
            [
                *(sys.executable, "-m", "launcher", str(ROOT / "recipes/quickstart.yaml"), *arguments),
                *("--procs", str(workers), "--run-dir", str(run)),
            ],
            check=False,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return float(events(RunDir(run), "first_step")[0]["time"]) - start


def torchrun_first_step(workers: int) -> float:
    """Seconds from starting torchrun to the first optimizer step of a minimal DDP script."""
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    start = time.time()
    found = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"),
            str(HERE / "torchrun_ddp.py"),
        ],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
    )
    return float(found.stdout.split("first step at ")[1].split()[0]) - start


def help_seconds(program: list[str]) -> float:
    """Seconds of a help text."""
    start = time.perf_counter()
    subprocess.run([*program, "--help"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def compare(title: str, ours: list[float], theirs: list[float]) -> None:
    """Print medians and their ratio."""
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"{title:<44} launch {a:6.2f} s   other {b:6.2f} s   ratio {a / b:.2f}", flush=True)


def main() -> None:
    """Run both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8])
    args = parser.parse_args()
    torchx = shutil.which("torchx", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if torchx:
        pairs = [(help_seconds([sys.executable, "-m", "launcher"]), help_seconds([torchx])) for _ in range(5)]
        compare("help text, against torchx", [a for a, _ in pairs], [b for _, b in pairs])
    else:
        seconds = statistics.median(help_seconds([sys.executable, "-m", "launcher"]) for _ in range(5))
        print(f"help text: launch {seconds:.2f} s (pip install torchx to compare)")
    for workers in args.workers:
        pairs = [(launch_first_step(workers), torchrun_first_step(workers)) for _ in range(args.repeats)]
        title = f"to the first step, {workers} workers, against torchrun"
        compare(title, [a for a, _ in pairs], [b for _, b in pairs])


if __name__ == "__main__":
    main()
