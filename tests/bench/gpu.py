"""Images per second on the GPUs of this machine: `launch` against the loop that people write, and the loader's share.

    python -m tests.bench.gpu [--arch resnet50] [--image-size 224] [--batch-size 64] [--gpus N] [--rounds 3]

Both sides in turn, on the same JPEGs of noise: the same model, batch, precision (bf16 where there is any, else fp16),
optimizer and number of loader processes. The loop is DDP as torch's tutorials have it: ImageFolder with Pillow and
torchvision's transforms, DataLoader, DistributedSampler. Then each side's model alone, on images that are on the GPU
already, and its loader alone: what limits it. `--gpus 0` runs all that on the CPU, to try this file itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.autotune import write_photos

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
STEPS, WARM = 30, 10
"""Optimizer steps of a run, of which the first are not counted: libraries load, cuDNN tries its algorithms."""
PHOTO_SIZE = 400
WORKERS = 4
RECIPE = """
name: bench
model: {{arch: {arch}, weights: null}}
data: {{path: {photos}, image_size: {image_size}, augment: standard, workers: {workers}}}
batch: {{size: {batch_size}}}
optim: {{lr: 0.01, schedule: constant}}
train: {{epochs: 1, batchnorm_recompute: 0, early_stopping: {{patience: null}}}}
tracking: {{wandb: {{mode: disabled}}, log_every: {warm}}}
post: {{enabled: false}}
"""


def ours(folder: Path, options: argparse.Namespace) -> float:
    """Images per second of `launch`, from the first logged window on."""
    run = folder / f"run-{time.monotonic_ns()}"
    workers = ("--gpus", str(options.gpus)) if options.gpus else ("--procs", "1", "launch.device=cpu")
    command = [sys.executable, "-m", "launcher", str(folder / "recipe.yaml"), "--run-dir", str(run), *workers]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_s"] for line in lines[1:] if line["split"] == "train")


def plain(folder: Path, options: argparse.Namespace, what: str = "all") -> float:
    """Images per second of the plain loop, in processes of torchrun's; ``what``: all, model or loader."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={max(1, options.gpus)}", "-m", "tests.bench.gpu", "--loop", what]
    for name in ("arch", "image_size", "batch_size", "gpus"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PHOTOS": str(folder / "photos")}
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, env=env)
    return float(done.stdout.strip().splitlines()[-1])


def loop(what: str, options: argparse.Namespace) -> None:
    """The plain loop, on one rank; prints images per second of all ranks."""
    import torch
    import torch.distributed as dist
    from torchvision import models

    cuda = options.gpus > 0
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    dist.init_process_group("nccl" if cuda else "gloo")
    model = models.get_model(options.arch, num_classes=2).to(device, memory_format=torch.channels_last)
    ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if cuda else None)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    scaler = torch.amp.GradScaler(device.type, enabled=cuda and not bf16)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16 if bf16 else torch.float16, enabled=cuda):
            loss = torch.nn.functional.cross_entropy(ddp(images), labels.to(device, non_blocking=True))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    start = 0.0
    for number, batch in enumerate(_batches(what, options, device)):
        if number == WARM:
            _wait(device)
            start = time.monotonic()
        if what != "loader":
            step(*batch)
    _wait(device)
    if dist.get_rank() == 0:
        print((STEPS - WARM) * options.batch_size * dist.get_world_size() / (time.monotonic() - start), flush=True)
    dist.destroy_process_group()


def _batches(what: str, options: argparse.Namespace, device: Any) -> Iterator[Any]:
    """Those of a loader; or for the model alone the same ones again and again, on the device."""
    import torch
    from torch.utils.data import DataLoader, DistributedSampler
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    if what == "model":
        images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=device)
        labels = torch.randint(2, (options.batch_size,), device=device)
        for _ in range(STEPS):
            yield images, labels
        return
    crop = transforms.RandomResizedCrop(options.image_size)
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize])
    data = ImageFolder(Path(os.environ["PHOTOS"]) / "train", transform)
    yield from DataLoader(
        data,
        options.batch_size,
        sampler=DistributedSampler(data),
        num_workers=WORKERS,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--gpus", type=int, default=None, help="all by default; 0: the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        loop(options.loop, options)
        return
    if options.gpus is None:
        from launcher.plan import topology

        options.gpus = topology.detect().num_gpus
        if not options.gpus:
            print("no GPU: nothing was measured")
            return
    with tempfile.TemporaryDirectory() as name:
        compare(Path(name), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Both in turn, then what limits them."""
    ranks = max(1, options.gpus)
    photos = write_photos(folder / "photos", size=PHOTO_SIZE, num=STEPS * options.batch_size * ranks)
    known = {"arch": options.arch, "image_size": options.image_size, "batch_size": options.batch_size}
    text = RECIPE.format(photos=photos, workers=WORKERS, warm=WARM, **known)
    (folder / "recipe.yaml").write_text(text)
    rounds = [(ours(folder, options), plain(folder, options)) for _ in range(options.rounds)]
    our, their = (statistics.median(side) for side in zip(*rounds, strict=True))
    ratios = ", ".join(f"{one / other:.2f}" for one, other in rounds)
    print(
        f"{options.arch} at {options.image_size} px, batch {options.batch_size}, {ranks} ranks, {WORKERS} loaders each"
    )
    print(f"launch {our:.0f} images/s, the plain loop {their:.0f}; ratios of the rounds: {ratios}")
    model, loader = plain(folder, options, "model"), plain(folder, options, "loader")
    print(f"the loop's model alone {model:.0f} images/s, its loader alone {loader:.0f}")
    print(f"of the model's speed launch keeps {our / model:.0%}, the plain loop {their / model:.0%}")


if __name__ == "__main__":
    main()
