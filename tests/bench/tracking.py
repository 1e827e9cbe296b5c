"""What tracking costs a step: a run with it and one without in turn, and the ratio of their step times.

    python -m tests.bench.tracking [--repeats N] [--epochs N] [--arch ARCH]

Each run is one worker on digits, with a line of metrics.jsonl a step, which is the most that a tracker can be given to
do. Its time is the median of the time between two lines, without the first quarter. wandb records offline, TensorBoard
beside it where it is installed. On a machine with as many workers as cores the trackers share the workers' cores, at a
lower priority: there the ratio is at its worst.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl
from launcher.tracking import sink as sinks

ROOT = Path(__file__).parents[2]


def step_time(run: RunDir) -> float:
    """Seconds of a step: the median."""
    times = [line["time"] for line in read_jsonl(run.metrics) if line["split"] == "train"]
    between = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(between[len(between) // 4 :])


def train(folder: Path, name: str, options: list[str]) -> float:
    """A run; the time of its steps."""
    run = RunDir(folder / name)
    command = [sys.executable, "-m", "launcher", "debug", "--backend", "torchrun", "--procs", "1"]
    subprocess.run([*command, "--run-dir", str(run.path), *options], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return step_time(run)


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--arch", default="mobilenet_v3_small")
    args = parser.parse_args()
    backends = ["wandb", *(["tensorboard"] if sinks.lacking("tensorboard") is None else [])]
    own = [f"train.epochs={args.epochs}", f"model.arch={args.arch}", "tracking.log_every=1", "post.enabled=false"]
    sides = {
        "without": ["tracking.wandb.mode=disabled"],
        "with": ["tracking.wandb.mode=offline", f"tracking.backends=[{','.join(backends)}]"],
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for side, options in list(sides.items())[:: 1 if repeat % 2 == 0 else -1]:
                times[side].append(train(Path(folder), f"{side}-{repeat}", [*own, *options]))
    ratios = [tracked / bare for tracked, bare in zip(times["with"], times["without"], strict=True)]
    for side, found in times.items():
        print(f"{side:<8} tracking: {1000 * statistics.median(found):.2f} ms a step (median of {args.repeats} runs)")
    print(f"ratio: {statistics.median(ratios):.4f} (of each pair: {', '.join(f'{ratio:.3f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
