"""What is compared: images, and runs of recipes on them with other settings."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[3]
RANKS = 2
SMALL_CLASS, NUM_SMALL = "skirt", 10
NUM_DIGITS = 200
HEAD, FINE = "recipes/photos_mobilenet_v2.yaml", "recipes/photos_fine_tuning.yaml"
SCRATCH = "recipes/quickstart.yaml"
PLAIN = {
    "image_size": 64,
    "crop_scale": [0.4, 1.0],
    "batch_size": 16,
    "lr": 5e-4,
    "weight_decay": 1e-2,
    "warmup_epochs": 0.5,
    "epochs": 3,
    "label_smoothing": 0.1,
}
"""What the plain loop and our side of it are given."""
AS_PLAIN = (
    "model.freeze=[]",
    "data.augment=standard",
    *(f"data.{key}={PLAIN[key]}" for key in ("image_size", "crop_scale")),
    f"batch.size={PLAIN['batch_size']}",
    *(f"optim.{key}={PLAIN[key]}" for key in ("lr", "weight_decay", "warmup_epochs")),
    *(f"train.{key}={PLAIN[key]}" for key in ("epochs", "label_smoothing")),
    "train.batchnorm_recompute=0",
    "train.feature_views=0",
)
FROM_SCRATCH = (
    "data.name=imagefolder",
    *("data.mean=[0,0,0]", "data.std=[1,1,1]"),  # RandAugment turns in black, as digits' margins are
    *("launch.procs=1", "launch.backend=local", "batch.size=20", "optim.lr=0.02", "optim.warmup_epochs=3"),
    *("train.epochs=80", "train.batchnorm_recompute=10", "train.early_stopping.patience=null"),
)
SMALL = ("data.image_size=96", "train.feature_views=1")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of those that are compared."""

    recipe: str = HEAD
    """Of ours."""
    changes: tuple[str, ...] = ()
    """Of the recipe."""
    photos: Callable[[Bench], Path] = field(default=lambda bench: bench.photos)
    """Its images."""
    values: str = ""
    """What the names of its metrics begin with, as in ema_top1."""
    is_plain: bool = False
    """Whether it is the plain DDP loop."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table."""

    title: str
    """What it is about."""
    sides: dict[str, Side]
    """By their names; each is compared with the first."""
    metric: str = "top1"
    """Of validation."""
    needs_photos: bool = True
    """Whether it needs --photos and --weights."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where the images and the weights are, and where runs go."""

    folder: Path
    """Of the runs; those that are there already are not trained again."""
    photos: Path
    """With train/CLASS and val/CLASS."""
    weights: str
    """Of mobilenet_v2."""

    def measure(self, side: Side, seed: int, metric: str) -> list[float]:
        """The metric of each epoch's validation."""
        if side.is_plain:
            return self._plain(side, seed)
        lines = self._launch(side, seed).read_text().splitlines()
        return [line[side.values + metric] for line in map(json.loads, lines) if line["split"] == "val"]

    def _launch(self, side: Side, seed: int) -> Path:
        """metrics.jsonl of a run that has ended."""
        known = [side.recipe, f"data.path={side.photos(self)}", *side.changes, f"seed={seed}"]
        if side.recipe != SCRATCH:
            known.append(f"model.weights={self.weights}")
        run = self._place(known)
        if not (run / "done").exists():
            shutil.rmtree(run, ignore_errors=True)
            fixed = (f"launch.procs={RANKS}", "launch.device=cpu", "post.enabled=false", "tracking.wandb.mode=disabled")
            command = [sys.executable, "-m", "launcher", known[0], *fixed, *known[1:], "--run-dir", str(run)]
            _run(command, run.with_suffix(".log"))
            (run / "done").write_text(json.dumps(known))
        return run / "metrics.jsonl"

    def _plain(self, side: Side, seed: int) -> list[float]:
        photos = side.photos(self)
        classes = len([*(photos / "train").iterdir()])
        known = PLAIN | {"photos": str(photos), "weights": self.weights, "seed": seed, "num_classes": classes}
        log = self._place(["plain", json.dumps(known)]).with_suffix(".json")
        if not log.exists():
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
            command = [*torchrun, "-m", "tests.bench.accuracy.loop"]
            _run(command, log.with_suffix(".log"), BENCH=json.dumps(known))
            log.with_suffix(".log").rename(log)
        found: list[float] = json.loads(log.read_text().splitlines()[-1])
        return found

    def _place(self, known: list[str]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]

    def made(self, name: str, write: Callable[[Path], Any]) -> Path:
        """A folder of images that is written once."""
        target = self.folder / name
        if not target.exists():
            part = target.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            write(part)
            part.rename(target)
        return target


def _run(command: list[str], log: Path, **variables: str) -> None:
    env = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | variables
    with log.open("w") as out:
        done = subprocess.run(command, cwd=ROOT, check=False, stdout=out, stderr=subprocess.STDOUT, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-3000:]}")


def _files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Each image, and its path within the folder."""
    return ((file, file.relative_to(folder)) for file in sorted(folder.glob("*/*/*")))


def enlarged(bench: Bench) -> Path:
    """The photos twice as large, so that files have more than the 64 KiB up to which all are decoded whole."""

    def write(target: Path) -> None:
        for file, name in _files(bench.photos):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with Image.open(file) as image:
                large = image.convert("RGB").resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)
            large.save(target / name, quality=92)

    return bench.made("enlarged", write)


def skewed(bench: Bench) -> Path:
    """The photos with few of one class to train on."""

    def write(target: Path) -> None:
        left = NUM_SMALL
        for file, name in _files(bench.photos):
            if name.parts[:2] == ("train", SMALL_CLASS):
                left -= 1
                if left < 0:
                    continue
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)

    return bench.made("skewed", write)


def few_digits(bench: Bench) -> Path:
    """Of the digits 200 to train on, of all classes alike; those of validation as they are."""

    def write(target: Path) -> None:
        from launcher.images.digits import write_digits

        write_digits(target)
        for folder in (target / "train").iterdir():
            for file in sorted(folder.iterdir())[NUM_DIGITS // 10 :]:
                file.unlink()

    return bench.made("digits", write)


_ON_DIGITS = {"recipe": SCRATCH, "photos": few_digits}
STUDIES: dict[str, Study] = {
    "fine-tuning": Study(
        title="A new head on a frozen mobilenet_v2, and fine-tuning; 1,000 photos, 160 px",
        sides={f"head only ({HEAD})": Side(), f"fine-tuning ({FINE})": Side(recipe=FINE)},
    ),
    "ema": Study(
        title="The same fine-tuning's weights, and their moving average",
        sides={"weights": Side(recipe=FINE), "EMA": Side(recipe=FINE, values="ema_")},
    ),
    "plain-loop": Study(
        title=f"All of mobilenet_v2 at {PLAIN['image_size']} px for {PLAIN['epochs']} epochs, AdamW",
        sides={"plain DDP loop": Side(is_plain=True), "launch": Side(changes=AS_PLAIN)},
    ),
    "decode": Study(
        title="Head only at 96 px, on the photos twice as large (800 x 1068)",
        sides={
            f"data.decode: {kind}": Side(photos=enlarged, changes=(f"data.decode={kind}", *SMALL))
            for kind in ("exact", "fast")
        },
    ),
    "scratch": Study(
        title=f"resnet18 from random weights on {NUM_DIGITS} digits, 80 epochs",
        sides={
            "plain": Side(changes=FROM_SCRATCH, **_ON_DIGITS),
            "data.mixup: 0.2": Side(changes=(*FROM_SCRATCH, "data.mixup=0.2"), **_ON_DIGITS),
            "data.auto_augment: randaugment": Side(
                changes=(*FROM_SCRATCH, "data.auto_augment=randaugment"), **_ON_DIGITS
            ),
        },
        needs_photos=False,
    ),
    "balance": Study(
        title=f"Head only at 96 px, {NUM_SMALL} images of {SMALL_CLASS} and 100 of each other class; macro F1",
        sides={
            f"data.balance: {kind}": Side(
                photos=skewed, changes=(f"data.balance={kind}", "train.early_stopping.metric=val/f1", *SMALL)
            )
            for kind in ("none", "weights", "sampler")
        },
        metric="f1",
    ),
}
