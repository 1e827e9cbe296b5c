"""A new head on a frozen mobilenet_v2: from kept features, from images, and the plain DDP loop; ratios printed.

    python -m tests.bench.features [--photos FOLDER] [--weights FILE] [--rounds 3] [--epochs 4] [--image-size 160]

All in turn, with 2 ranks of a thread each on the CPU, on the same photos (train/CLASS and val/CLASS; without
``--photos`` 1,000 JPEGs of noise, 400 x 534): the plain loop is DDP as torch's tutorials have it, with Pillow,
torchvision's transforms and a frozen backbone. Images per second of the epochs after the first, with their validations
(and checkpoints, which the loop has none of), and the CPU seconds of all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANKS = 2
BATCH_SIZE = 32
ROOT = Path(__file__).parents[2]
RECIPE = """
name: bench
model: {{arch: mobilenet_v2, weights: {weights}, freeze: [backbone]}}
data: {{path: {photos}, image_size: {image_size}, augment: light, workers: 0}}
batch: {{size: {batch_size}}}
optim: {{name: adamw, lr: 0.002}}
train: {{epochs: {epochs}, feature_views: {views}, early_stopping: {{patience: null}}}}
tracking: {{wandb: {{mode: disabled}}}}
post: {{enabled: false}}
launch: {{device: cpu, procs: {ranks}}}
"""


def run(command: list[str], **variables: str) -> tuple[str, float]:
    """What a command prints, and the CPU seconds of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(folder: Path, photos: Path, options: argparse.Namespace, views: int) -> tuple[float, float]:
    """Images per second of `launch` from the second epoch on, and its CPU seconds."""
    name = f"run-{time.monotonic_ns()}"
    recipe, weights = folder / f"{name}.yaml", options.weights or "null"
    known = {"photos": photos, "weights": weights, "image_size": options.image_size, "epochs": options.epochs}
    recipe.write_text(RECIPE.format(views=views, ranks=RANKS, batch_size=BATCH_SIZE, **known))
    _, cpu = run([sys.executable, "-m", "launcher", str(recipe), "--run-dir", str(folder / name)])
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    ends = [line["time"] for line in lines if line["split"] == "val"]
    num = len(list(photos.glob("train/*/*")))
    return num * (len(ends) - 1) / (ends[-1] - ends[0]), cpu


def plain(photos: Path, options: argparse.Namespace) -> tuple[float, float]:
    """The same of the plain loop."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "tests.bench.features", "--loop", "--photos", str(photos)]
    for name in ("epochs", "image_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    found, cpu = run(command)
    return float(found.split()[-1]), cpu


def loop(options: argparse.Namespace) -> None:
    """The plain loop, on one rank; prints images per second of all ranks."""
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader, DistributedSampler
    from torchvision import models, transforms
    from torchvision.datasets import ImageFolder

    dist.init_process_group("gloo")
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    size, end = options.image_size, [transforms.ToTensor(), normalize]
    crops = {
        "train": [transforms.RandomResizedCrop(size, scale=(0.64, 1.0))],
        "val": [transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size)],
    }
    data = {s: ImageFolder(options.photos / s, transforms.Compose([*crops[s], *end])) for s in crops}
    loaders = {
        s: DataLoader(data[s], BATCH_SIZE, sampler=DistributedSampler(data[s], shuffle=s == "train")) for s in data
    }
    model = models.mobilenet_v2(num_classes=len(data["train"].classes))
    model.features.requires_grad_(False)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=0.002)
    start = 0.0
    for _ in range(options.epochs):
        ddp.train()
        for images, labels in loaders["train"]:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(ddp(images), labels).backward()
            optimizer.step()
        ddp.eval()
        with torch.no_grad():
            hits = sum((model(images).argmax(1) == labels).sum() for images, labels in loaders["val"])
        dist.all_reduce(hits)
        start = start or time.monotonic()
    if dist.get_rank() == 0:
        print(len(data["train"]) * (options.epochs - 1) / (time.monotonic() - start), flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Print each side's median, and the ratios of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--weights", help="of mobilenet_v2, as model.weights; without, random ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        loop(options)
        return
    with tempfile.TemporaryDirectory() as name:
        photos = options.photos or write_photos(Path(name) / "photos")
        compare(Path(name), photos, options)


def write_photos(folder: Path) -> Path:
    """JPEGs of noise, of the size of the photos that the figures in docs/evidence.md are of."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 1000), ("val", 200)):
        for index in range(count):
            file = folder / split / "ab"[index % 2] / f"{index:04d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (27, 20, 3), dtype=np.uint8))
            small.resize((400, 534)).save(file)
    return folder


def compare(folder: Path, photos: Path, options: argparse.Namespace) -> None:
    """All sides in turn."""
    sides = {
        "features kept": lambda: ours(folder, photos, options, 1),
        "from images": lambda: ours(folder, photos, options, 0),
        "plain DDP loop": lambda: plain(photos, options),
    }
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, measure in sides.items():
            found[side].append(measure())
    print(
        f"mobilenet_v2, head only, {options.image_size} px, {RANKS} ranks, {options.epochs} epochs, from the second on"
    )
    for side, of_rounds in found.items():
        speed, cpu = (statistics.median(values) for values in zip(*of_rounds, strict=True))
        ratios = [one / other for (one, _), (other, _) in zip(of_rounds, found["plain DDP loop"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{side:<16}{speed:8.0f} images/s, {spread} of the loop's; {cpu:6.1f} CPU s of the whole run", flush=True)


if __name__ == "__main__":
    main()
