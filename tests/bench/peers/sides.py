"""What is compared: each side's command, and how fast it trained."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.bench.autotune import write_photos
from tests.bench.peers import environment

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

ROOT = Path(__file__).parents[3]
LOOK_S = 0.1
"""Between two looks at the CPU time of a side."""
NUM_VAL = 16
PHOTO_SIZE = 400
TIMM_NAMES = {"mobilenet_v2": "mobilenetv2_100", "mobilenet_v3_large": "mobilenetv3_large_100"}
"""Where timm calls torchvision's model otherwise."""
RECIPE = """
name: bench
model: {{arch: {model}, weights: null, freeze: [{freeze}]}}
data: {{path: {data}, image_size: {px}, augment: standard}}
batch: {{size: {batch}}}
optim: {{lr: 0.01, momentum: 0.9, weight_decay: 1.0e-4, schedule: constant}}
precision: fp32
train: {{epochs: {epochs}, batchnorm_recompute: 0, early_stopping: {{patience: null}}}}
tracking: {{wandb: {{mode: disabled}}, log_every: {skip}}}
post: {{enabled: false}}
launch: {{device: cpu, procs: {ranks}, backend: torchrun}}
"""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a run trained."""

    images_per_s: float
    """By the wall clock."""
    images_per_cpu_s: float
    """By the CPU time of all its processes."""

    @property
    def both(self) -> tuple[float, float]:
        """As a pair."""
        return self.images_per_s, self.images_per_cpu_s

    def __str__(self) -> str:
        return f"{self.images_per_s:7.1f} images/s {self.images_per_cpu_s:7.1f} images per CPU second"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every side has to do."""

    folder: Path
    """For files."""
    options: argparse.Namespace
    """Of the command line."""
    python: Path
    """Of the peers' environment."""

    @classmethod
    def prepare(cls, folder: Path, options: argparse.Namespace, python: Path) -> Work:
        """Take as many images as the steps need, of all classes alike, and write the recipe."""
        num = options.steps * options.batch * options.ranks
        if options.data:
            _take(options.data / "train", folder / "photos" / "train", num)
            _take(options.data / "train", folder / "photos" / "val", NUM_VAL)
        else:
            write_photos(folder / "photos", size=PHOTO_SIZE, num=num)
        known = vars(options) | {"data": folder / "photos", "freeze": "backbone" if options.head_only else ""}
        (folder / "recipe.yaml").write_text(RECIPE.format(**known))
        return cls(folder=folder, options=options, python=python)

    @property
    def as_variables(self) -> dict[str, str]:
        """For the loops, which read them (loops.py)."""
        names = ("model", "px", "batch", "epochs", "workers", "head_only")
        values = {name: getattr(self.options, name) for name in names} | {"data": str(self.folder / "photos")}
        return {"BENCH": json.dumps(values), "STAMPS": str(self.folder / "stamps"), "PYTHONPATH": str(ROOT)}


def _take(source: Path, target: Path, num: int) -> None:
    """Copy that many images, from each class in turn; again from the first where there are fewer."""
    classes = sorted(folder for folder in source.iterdir() if folder.is_dir())
    rounds = itertools.zip_longest(*(sorted(file for file in folder.iterdir() if file.is_file()) for folder in classes))
    files = [file for files in rounds for file in files if file]
    for index, file in enumerate(itertools.islice(itertools.cycle(files), num)):
        copy = target / file.parent.name / f"{index:06d}{file.suffix}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _launch(work: Work) -> list[str]:
    run = work.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    return [
        sys.executable,
        "-m",
        "launcher",
        str(work.folder / "recipe.yaml"),
        "--run-dir",
        str(run),
        *work.options.set,
    ]


def _torchrun(work: Work, *command: str) -> list[str]:
    ranks = f"--nproc-per-node={work.options.ranks}"
    return [str(work.python), "-m", "torch.distributed.run", "--standalone", ranks, "-m", *command]


def _loop(name: str) -> Callable[[Work], list[str]]:
    return lambda work: _torchrun(work, "tests.bench.peers.loops", name)


def _timm(work: Work) -> list[str]:
    options, photos = work.options, str(work.folder / "photos")
    script = str(environment.timm_script(work.python))
    classes = len([*(work.folder / "photos" / "train").iterdir()])
    arguments = {
        "data-dir": photos,
        "model": TIMM_NAMES.get(options.model, options.model),
        "num-classes": classes,
        "img-size": options.px,
        "batch-size": options.batch,
        "epochs": options.epochs,
        "workers": options.workers,
        "device": "cpu",
        "opt": "sgd",
        "lr": 0.01,
        "momentum": 0.9,
        "weight-decay": 1e-4,
        "color-jitter": 0,
        "smoothing": 0,
        "warmup-epochs": 0,
        "output": str(work.folder / "timm"),
    }
    named = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    return _torchrun(work, "tests.bench.peers.loops", "timm", script, *named, "--scale", "0.25", "1.0")


SIDES: dict[str, Callable[[Work], list[str]]] = {
    "launch": _launch,
    "ddp": _loop("ddp"),
    "accelerate": _loop("accelerate"),
    "lightning": _loop("lightning"),
    "timm": _timm,
}
"""The command of each, by its name."""


def measure(side: str, work: Work) -> Speed:
    """Run a side once."""
    stamps = work.folder / "stamps"
    stamps.unlink(missing_ok=True)
    env = os.environ | work.as_variables | {"CUDA_VISIBLE_DEVICES": ""}
    log = work.folder / f"{side}.log"
    with log.open("wb") as out:
        running = subprocess.Popen(SIDES[side](work), cwd=work.folder, env=env, stdout=out, stderr=subprocess.STDOUT)
        cpu = _CpuTime(running.pid)
        if running.wait():
            raise SystemExit(f"{side} failed:\n{log.read_text(errors='replace')[-3000:]}")
    cpu.finish()
    return _speed(_window_times(side, work, stamps), work.options, cpu)


def _window_times(side: str, work: Work, stamps: Path) -> list[tuple[float, float]]:
    """Of each epoch, when its first counted step began and its last ended."""
    options = work.options
    if side == "launch":
        lines = [json.loads(line) for line in (work.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        at = {line["step"]: line["time"] for line in lines if line["split"] == "train"}
    else:
        at = {number: float(line) for number, line in enumerate(stamps.read_text().split(), start=1)}
    starts = range(0, options.epochs * options.steps, options.steps)
    return [(at[start + options.skip], at[start + options.steps]) for start in starts]


def _speed(windows: list[tuple[float, float]], options: argparse.Namespace, cpu: _CpuTime) -> Speed:
    images = len(windows) * (options.steps - options.skip) * options.batch * options.ranks
    return Speed(
        images_per_s=images / sum(end - start for start, end in windows),
        images_per_cpu_s=images / sum(cpu.at(end) - cpu.at(start) for start, end in windows),
    )


class _CpuTime:
    """CPU seconds that a process and its descendants have taken, looked at again and again.

    Args:
        pid: of the process.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[tuple[int, float], float] = {}
        self._course: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def finish(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def at(self, moment: float) -> float:
        """Those up to a moment (time.time)."""
        before = [one for one in self._course if one[0] <= moment][-1]
        after = next((one for one in self._course if one[0] > moment), before)
        part = (moment - before[0]) / (after[0] - before[0]) if after != before else 0.0
        return before[1] + part * (after[1] - before[1])

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in processes:
                try:
                    times = process.cpu_times()
                    self._seen[process.pid, process.create_time()] = times.user + times.system
                except psutil.NoSuchProcess:
                    continue
            self._course.append((time.time(), sum(self._seen.values())))
