"""A tiny image folder, run directories over it, and real process groups to train them in."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from launcher.engine import optim
from launcher.engine.device import Device
from launcher.engine.distributed import Ranks
from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer
from launcher.recipe import load as recipes
from launcher.runs.run_dir import RunDir
from launcher.system.files import write_json_atomic
from launcher.system.processes import die_with_parent
from tests.nets import PLAIN

SIZE = 32
CLASSES = ("bee", "cat", "cow", "dog", "elk", "fox", "gnu")
RANKS_END_S = 150  # far more than anything here takes: ranks that wait for each other must not hold the tests up
PEERS_END_S = 5  # after one of them failed
CPU = Device(type="cpu")


def pytest_configure(config):
    # torchvision 0.29 announces that torchcodec will take over from its decoders.
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding:DeprecationWarning")
    torch.set_num_threads(1)
    # The first backward pass of a process starts a thread for each device, and no fork of it could train then. An
    # export (torch's FakeTensorMode) registers devices that are none: before one, nothing is started, also later.
    torch.ones(1, requires_grad=True).sum().backward()


def write_images(folder, *, train, val, classes=CLASSES):
    """PNGs of noise about a colour that goes with the class, so that there is something to learn."""
    rng = np.random.default_rng(0)
    for split, num in (("train", train), ("val", val)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
        for index in range(num):
            label = index % len(classes)
            colour = np.array([label * 36, 255 - label * 36, label % 2 * 200])
            pixels = np.clip(colour + rng.normal(0, 60, (SIZE, SIZE, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / split / classes[label] / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """37 images to train on and 23 to validate with, of 7 classes, 32 x 32 px."""
    return write_images(tmp_path_factory.mktemp("photos"), train=37, val=23)


def merge(base, changes):
    """``base`` with ``changes``, section by section."""
    return {
        **base,
        **{k: merge(base[k], v) if isinstance(v, dict) and k in base else v for k, v in changes.items()},
    }


@pytest.fixture
def make_run(tmp_path, photos):
    """Make a run directory by hand, as commands/launch.py does; keyword arguments change its recipe."""

    def make(name="run", **changes):
        own = {} if "arch" in changes.get("model", {}) else PLAIN
        recipe = {
            "name": name,
            "model": {"weights": None, **own},
            "data": {"path": str(photos), "image_size": SIZE, "crop_pct": 1.0, "augment": "none", "workers": 0},
            "batch": {"size": 18},
            "optim": {"lr": 0.02, "schedule": "constant"},
            "precision": "fp32",
            "train": {"epochs": 1, "checkpoint": {"every_minutes": None}, "early_stopping": {"patience": None}},
            "tracking": {"wandb": {"mode": "disabled"}, "log_every": 1},
        }
        run = RunDir(tmp_path / name)
        run.create()
        write_json_atomic(run.plan, {"run_id": name, "device": "cpu"})
        run.recipe.write_text(recipes.to_yaml(recipes.from_dict(merge(recipe, changes))))
        return run

    return make


SLOWEST = ("slowest_rank", "slowest_behind")


class Records:
    """Stands for rank 0's recorder: what it is told is kept in a list, and events go to the run directory."""

    def __init__(self, run):
        self._run = run
        self.lines = []

    def say(self, line):
        pass

    def progress(self, **position):
        pass

    def first_step(self, **position):
        pass

    def epoch(self, *, epoch, values):
        pass

    def status(self, state="running", **fields):
        pass

    def event(self, kind, **fields):
        self._run.append_event(kind, **fields)

    def ranks(self, times):
        self.rank_times = times

    def best_validation(self, found):
        self.found = found

    def resumed(self, *, num_steps, **fields):
        self.event("resumed", **fields)

    def checkpoint(self, *, step, best, seconds, size_mb):
        self.event("checkpoint", step=step, best=best)

    def step(self, *, epoch, step, values):
        kept = {k: v for k, v in values.items() if k not in ("images_per_s", "data_wait", "memory_mb", *SLOWEST)}
        self.lines.append({"split": "train", "epoch": epoch, "step": step, **kept})

    def validation(self, *, epoch, step, values, best):
        self.lines.append({"split": "val", "epoch": epoch, "step": step, "best": best, **values})


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def identical(one, other):
    """Whether nested states are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(identical, one, other))
    return one == other


@dataclass(frozen=True, kw_only=True)
class FromScale(Device):
    """A CPU whose gradient scaler begins at a scale at which nothing overflows, or at which everything does."""

    scale: float

    def grad_scaler(self, precision):
        return torch.amp.GradScaler("cpu", init_scale=self.scale, enabled=precision == "fp16")


def from_scale(scale):
    """A CPU that scales losses from here on, where the precision is fp16."""
    return FromScale(type="cpu", scale=scale)


def never():
    return False


def at_poll(number):
    """Asks to stop when it is asked for the ``number``-th time, from 1."""
    asked = iter(range(1, 10**6))
    return lambda: next(asked) >= number


def without_dropout(parts):
    """Take out what is random in a model, so that it can be compared with one that sees its images in other batches."""
    for module in parts.model.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def train(run, ranks=None, *, stop=never, prepare=None):
    """Train a run as one rank, in the process group that is there; return what came out, as plain values."""
    ranks = ranks or Ranks()
    parts = build_parts(run, ranks, CPU)
    initial = {k: v.clone() for k, v in parts.model.module.state_dict().items()}
    if prepare:
        prepare(parts)
    records = Records(run) if ranks.rank == 0 else None
    trainer = Trainer(parts, recorder=records, stop_requested=stop)
    outcome = trainer.run()
    return SimpleNamespace(
        outcome=outcome,
        initial=initial,
        state={k: v.clone() for k, v in parts.model.module.state_dict().items()},
        optimizer=optim.saved(parts.optimizer),
        lines=records.lines if records else [],
        best=trainer.best,
        step=trainer.state.step,
    )


@contextlib.contextmanager
def process_group(folder, ranks, name="group"):
    store = dist.FileStore(str(folder / name), ranks.world_size)
    dist.init_process_group(
        "gloo", store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timedelta(seconds=RANKS_END_S)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    with process_group(tmp_path, Ranks()):
        yield


def _rank_main(function, folder, ranks):
    die_with_parent()
    try:
        torch.set_num_threads(1)
        with process_group(folder, ranks):
            torch.save(function(ranks), folder / f"rank-{ranks.rank}.pt")
    except BaseException:
        (folder / f"rank-{ranks.rank}.txt").write_text(traceback.format_exc())
        os._exit(1)


def _wait(processes):
    """Wait for all; where one failed its peers get a while to see that it is gone."""
    until = time.monotonic() + RANKS_END_S
    while running := [process for process in processes if process.exitcode is None]:
        multiprocessing.connection.wait([process.sentinel for process in running], until - time.monotonic())
        if any(process.exitcode for process in processes):
            until = min(until, time.monotonic() + PEERS_END_S)
        if time.monotonic() >= until:
            for process in running:
                process.kill()


@pytest.fixture
def in_ranks(tmp_path):
    """Call a function of Ranks in as many forked processes with a real gloo group; return what each of them returned.

    With ``failing`` their exit codes are returned instead, as they ended.
    """
    numbers = itertools.count()

    def call(world_size, function, *, failing=False):
        folder = tmp_path / f"ranks-{next(numbers)}"
        folder.mkdir()
        fork = multiprocessing.get_context("fork")
        ranks = [
            Ranks(rank=r, local_rank=r, world_size=world_size, local_world_size=world_size) for r in range(world_size)
        ]
        processes = [fork.Process(target=_rank_main, args=(function, folder, who)) for who in ranks]
        for process in processes:
            process.start()
        _wait(processes)
        codes = [process.exitcode for process in processes]
        if failing:
            return codes
        errors = [file.read_text() for file in sorted(folder.glob("rank-*.txt"))]
        assert codes == [0] * world_size, "\n".join(errors)
        return [torch.load(folder / f"rank-{r}.pt", weights_only=False) for r in range(world_size)]

    return call


@pytest.fixture
def engine():
    """The helpers of this file, for tests that are in no package and cannot import it."""
    return SimpleNamespace(
        train=train,
        at_poll=at_poll,
        never=never,
        without_dropout=without_dropout,
        write_images=write_images,
        cpu=CPU,
        from_scale=from_scale,
        identical=identical,
        largest_difference=largest_difference,
        records=Records,
    )
