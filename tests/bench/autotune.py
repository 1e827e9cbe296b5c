"""batch.size: auto against trying every batch size, under memory limits that the kernel enforces (control groups).

    python -m tests.bench.autotune [--models NAME …]

For each model and limit: a run that tunes itself and then trains 20 steps or more in a control group with the limit;
then, in the same group, many sizes up to what fits, in turn; then the chosen and the best of them in turn, for longer.
Printed: what was chosen, its speed against the best that fits, with how far that may be off, probes, seconds, and the
memory that training took at most against the limit. Exits with 1 where a speed is below 0.97 of the best by more than
that, or memory above the limit. The runs are short, but search as a long one does; with ``--tune-budget 0.05`` they
search as short ones, and measuring must not take more than a tenth of the run.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.cgroups import MemoryGroup

SIZES = [8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384]
SWEEP_TURNS, FINAL_TURNS = 6, 24
"""How often it is each size's turn, and then that of the chosen and of the best once more."""
LEAST, MOST_OF_SHORT = 0.97, 0.1
CASES = {
    "resnet18": {"image_size": 64, "num_images": 1600, "limits_gb": (1.6, 2.5)},
    "mobilenet_v3_small": {"image_size": 96, "num_images": 1600, "limits_gb": (1.4, 2.2)},
    "vit_b_16": {"image_size": 64, "num_images": 640, "limits_gb": (5.5, 7.0)},
}
RECIPE = """
name: bench
model: {{arch: {arch}, weights: null}}
data: {{path: {photos}, image_size: {image_size}, workers: 0, augment: none}}
batch: {{size: auto, tune_budget: {tune_budget}}}
optim: {{lr: 0.001}}
train: {{epochs: {epochs}, early_stopping: {{patience: null}}, checkpoint: {{every_steps: 5}}}}
tracking: {{wandb: {{mode: disabled}}}}
post: {{enabled: false}}
launch: {{device: cpu, procs: 1}}
"""


def write_photos(folder: Path, *, size: int, num: int) -> Path:
    """JPEGs of noise, of two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", num), ("val", 16)):
        for index in range(count):
            file = folder / split / "ab"[index % 2] / f"{index:05d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)
    return folder


def rss_bytes(group: MemoryGroup) -> int:
    """What all processes of a control group hold now that cannot be taken from them (no page cache)."""
    values = dict(line.split() for line in (group.path / "memory.stat").read_text().splitlines())
    return int(values.get("total_rss", values.get("anon", 0))) + int(values.get("total_shmem", values.get("shmem", 0)))


def train(group: MemoryGroup, recipe: Path, run: Path, env: dict[str, str]) -> tuple[int, int]:
    """Let a run tune itself and train; the exit code, and the most memory it held once it had begun to train."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            if (run / "tuning.json").exists():
                peak[0] = max(peak[0], rss_bytes(group))

    thread = threading.Thread(target=watch)
    thread.start()
    command = [sys.executable, "-m", "launcher", str(recipe), "--run-dir", str(run)]
    finished = group.run(command, env=env, stdout=subprocess.DEVNULL)
    done.set()
    thread.join()
    return finished.returncode, peak[0]


def sweep(run_dir: str, chosen: int) -> None:
    """Measure all sizes; prints as JSON what :func:`compare` reads. Runs in the control group."""
    import torch

    from launcher.engine.device import Device
    from launcher.engine.distributed import Ranks
    from launcher.engine.setup import open_data_sets
    from launcher.engine.tuning import autotune, probe
    from launcher.engine.tuning.child import OutOfMemoryError, TooSlowError, call_in_child
    from launcher.recipe import load as recipes
    from launcher.runs.run_dir import RunDir

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run, device = RunDir(run_dir), Device(type="cpu")
    recipe, data_sets = recipes.read_resolved(run.recipe), open_data_sets(run)
    budget = json.loads(run.tuning.read_text())["ranks"][0]["budget_bytes"]
    most = len(data_sets.train) // autotune.MIN_STEPS_PER_EPOCH

    def in_child(function):
        return call_in_child(function, timeout_s=900, heed_stop=lambda: None)

    def in_turn(sizes: list[int], turns: int) -> dict[int, list[float]]:
        with probe._training(run, device, data_sets, max(sizes)) as training:
            training.step(max(sizes))
            steps = {size: functools.partial(training.step, size) for size in sizes}
            return probe._in_turn(steps, turns, most_s=900)

    fit = []
    for size in sorted({chosen, *(s for s in SIZES if s <= most)}):
        try:
            found = in_child(functools.partial(probe.measure, run, device, data_sets, size))
        except (OutOfMemoryError, TooSlowError):
            break
        if autotune.needed_bytes(found, recipe=recipe, ranks=Ranks(), device=device, data_sets=data_sets) > budget:
            break
        fit.append(size)
    seconds = in_child(functools.partial(in_turn, fit, SWEEP_TURNS))
    speeds = {size: size / probe._quick(found) for size, found in seconds.items()}
    best = max(fit, key=speeds.__getitem__)
    finals = seconds if best == chosen else in_child(functools.partial(in_turn, [chosen, best], FINAL_TURNS))
    print(
        json.dumps(
            {
                "chosen": chosen / probe._quick(finals[chosen]),
                "best_size": best,
                "best": best / probe._quick(finals[best]),
                "off": 0.0 if best == chosen else math.hypot(*map(probe._noise, finals.values())),
                "sweep": {size: round(speed / max(speeds.values()), 3) for size, speed in speeds.items()},
            }
        )
    )


def main() -> int:
    """Print a line for each model and limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES))
    parser.add_argument("--epochs", type=int, default=2, help="the run's; few make a short one, with few probes")
    parser.add_argument(
        "--tune-budget", type=float, default=0.05, help="batch.tune_budget; 1: search as long as it takes"
    )
    parser.add_argument("--sweep", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sweep:
        sweep(args.sweep[0], int(args.sweep[1]))
        return 0
    held = []
    for arch in args.models:
        case = CASES[arch]
        for limit_gb in case["limits_gb"]:
            with tempfile.TemporaryDirectory() as name:
                held.append(compare(arch, case | vars(args), limit_gb, Path(name)))
    return 0 if all(held) else 1


def compare(arch: str, case: dict, limit_gb: float, folder: Path) -> bool:
    """One model under one limit; whether what has to hold held."""
    photos = write_photos(folder / "photos", size=case["image_size"], num=case["num_images"])
    recipe, run = folder / "recipe.yaml", folder / "run"
    recipe.write_text(RECIPE.format(arch=arch, photos=photos, **case))
    root = Path(__file__).parents[2]
    threads = str(os.cpu_count())
    env = os.environ | {"PYTHONPATH": str(root), "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": threads}
    limit = int(limit_gb * 1e9)
    with MemoryGroup(f"bench-{os.getpid()}", limit) as group:
        start = time.monotonic()
        code, peak = train(group, recipe, run, env)
        whole = time.monotonic() - start
        if code:
            print(f"{arch} {limit_gb:g} GB: exit code {code}")
            return False
        (rank,) = json.loads((run / "tuning.json").read_text())["ranks"]
        chosen = rank["batch_size"]
        command = [sys.executable, "-m", "tests.bench.autotune", "--sweep", str(run), str(chosen)]
        start = time.monotonic()
        done = group.run(command, env=env, cwd=root, stdout=subprocess.PIPE)
        took = time.monotonic() - start
        time.sleep(0.5)  # a group's processes are gone a moment after they have ended
    found = json.loads(done.stdout)
    ratio = found["chosen"] / found["best"]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    steps = max(e["step"] for e in events if e["kind"] == "checkpoint")
    ran_out = sum(e["kind"] == "out_of_memory" for e in events)
    tried = " ".join(f"{a['batch_size']}{'!' if a['problem'] else ''}" for a in rank["attempts"])
    tried += f"; in turn {' '.join(map(str, rank['compared']))}" if rank["compared"] else ""
    print(
        f"{arch} at {case['image_size']} px, {limit_gb:g} GB: chose {chosen}, {found['chosen']:.1f} images/s; the best "
        f"of {len(found['sweep'])} sizes that fit is {found['best_size']}, {found['best']:.1f}: {ratio:.3f} of it, "
        f"± {found['off']:.3f}; {rank['num_probes']} probes ({tried}) in {rank['seconds']:.0f} s, "
        f"{rank['seconds'] / whole:.1%} of the run's {whole:.0f} s (the sweep: {took:.0f} s); "
        f"{steps} steps held {peak / 1e9:.2f} GB at most ({peak / limit:.2f} of the limit), "
        f"ran out {ran_out} times",
        f"    the sweep: {' '.join(f'{size}:{part}' for size, part in found['sweep'].items())}",
        sep="\n",
        flush=True,
    )
    good = ratio + found["off"] >= LEAST if case["tune_budget"] == 1 else rank["seconds"] <= MOST_OF_SHORT * whole
    return good and peak <= limit and not ran_out


if __name__ == "__main__":
    sys.exit(main())
