"""Two ranks of which one is half as fast and the other has half the memory: shares by speed against equal ones.

    python -m tests.bench.uneven [--rounds N]

Rank 0 is pinned to a core that it shares with a busy loop, rank 1 to another core, with a limit to its memory
(RLIMIT_DATA). Both kinds of shares in turn, at the same global batch. Printed: shares, seconds of an epoch and their
ratio, how far the weights are from those of a single process. The model has no batch statistics; dropout is off.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from tests.bench.autotune import write_photos

GLOBAL_SIZE, NUM_IMAGES, IMAGE_SIZE = 48, 960, 96
LIMIT_BYTES = 330 << 20
RECIPE = """
name: uneven
model: {{arch: squeezenet1_1, weights: null}}
data: {{path: {photos}, image_size: {size}, workers: 0, augment: none}}
batch: {{size: auto, global_size: {global_size}}}
optim: {{lr: 0.001, schedule: constant}}
precision: fp32
train: {{epochs: 1, early_stopping: {{patience: null}}}}
tracking: {{wandb: {{mode: disabled}}}}
post: {{enabled: false}}
launch: {{device: cpu, procs: 2, threads: 1}}
"""


def launch_unevenly(arguments: list[str]) -> None:
    """``launch`` with ranks that are pinned and limited; in a process of its own."""
    from launcher import cli
    from launcher.engine import worker
    from launcher.engine.model import FineTunedModel
    from launcher.system.memory import status_bytes

    original, train_mode = worker.training, FineTunedModel.train

    def training(spec, ranks, *others, **options):
        os.sched_setaffinity(0, {ranks.local_rank})
        if ranks.rank == 1:
            limit = status_bytes("VmData") + LIMIT_BYTES
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return original(spec, ranks, *others, **options)

    def without_dropout(self):
        train_mode(self)
        for module in self.module.modules():
            if type(module).__name__ == "Dropout":
                module.p = 0.0

    worker.training, FineTunedModel.train = training, without_dropout
    sys.exit(cli.main(arguments))


def run(folder: Path, name: str, *changes: str) -> Path:
    """One run; returns its folder."""
    path = folder / name
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.bench.uneven", "--launch", str(folder / "recipe.yaml"), *changes]
    subprocess.run([*command, "--run-dir", str(path)], env=env, cwd=root, check=True, stdout=subprocess.DEVNULL)
    return path


def epoch_seconds(path: Path) -> float:
    """From the first step's end to the last's."""
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    first = next(e["time"] for e in events if e["kind"] == "first_step")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return max(line["time"] for line in lines if line["split"] == "train") - first


def main() -> None:
    """Print the comparison."""
    if sys.argv[1:2] == ["--launch"]:
        launch_unevenly(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    busy = subprocess.Popen([sys.executable, "-c", "import os; os.sched_setaffinity(0, {0})\nwhile True: pass"])
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            photos = write_photos(folder / "photos", size=IMAGE_SIZE, num=NUM_IMAGES)
            text = RECIPE.format(photos=photos, size=IMAGE_SIZE, global_size=GLOBAL_SIZE)
            (folder / "recipe.yaml").write_text(text)
            compare(folder, rounds=args.rounds)
    finally:
        busy.send_signal(signal.SIGKILL)
        busy.wait()


def compare(folder: Path, *, rounds: int) -> None:
    """Both kinds of shares in turn, and a single process."""
    every = "tracking.log_every=1"
    tuned, equal = [], []
    for number in range(rounds):
        uneven = run(folder, f"uneven-{number}", every)
        even = run(folder, f"even-{number}", every, "batch.size=8")
        tuned.append(epoch_seconds(uneven))
        equal.append(epoch_seconds(even))
    found = json.loads((uneven / "tuning.json").read_text())
    single = run(folder, "single", every, f"batch.size={GLOBAL_SIZE}", "launch.procs=1")
    weights = [load_file(path / "checkpoints/last/model.safetensors") for path in (uneven, single)]
    difference = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    for rank in found["ranks"]:
        tried = " ".join(f"{a['batch_size']}{'!' if a['problem'] else ''}" for a in rank["attempts"])
        print(
            f"rank {rank['rank']}: batch {rank['batch_size']} of {rank['max_size']} at most, "
            f"{rank['images_per_s']:.1f} images/s ({rank['limit']}; tried {tried})"
        )
    print(f"shares {found['batching']['shares']}, micro-batches {found['batching']['batch_sizes']}")
    print(
        f"an epoch: equal shares {min(equal):.1f} s, shares by speed {min(tuned):.1f} s, ratio "
        f"{min(equal) / min(tuned):.2f}; weights differ from a single process's by {difference:.1e} at most"
    )


if __name__ == "__main__":
    main()
