"""Where faults happen: a few images, an undisturbed run to compare with, and `launch` in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from PIL import Image

from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl
from tests import warm

if TYPE_CHECKING:
    import signal

ROOT = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("recipe.yaml")
CLASSES = ("cat", "dog", "fox")
NUM_TRAIN, NUM_VAL = 93, 21
STEPS_PER_EPOCH, EPOCHS = 12, 3  # 93 images by 8 a step: the last step of an epoch has 5
DEADLINE_S = 600
SIZE = 32


class NotHereError(Exception):
    """This machine does not let the fault be provoked."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a fault."""

    happened: str
    """In a sentence, with what was counted."""
    steps_lost: int | None = None
    """Steps that had been taken and were taken again; None: no step was at stake."""


def write_images(folder: Path) -> Path:
    """PNGs of noise about a colour that goes with the class."""
    rng = np.random.default_rng(0)
    for split, num in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for index in range(num):
            label = index % len(CLASSES)
            into = folder / split / CLASSES[label]
            into.mkdir(parents=True, exist_ok=True)
            pixels = np.array([label * 80, 128, 255 - label * 80]) + rng.normal(0, 60, (SIZE, SIZE, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype("uint8")).save(into / f"{index:03d}.png")
    return folder


class Launched:
    """A `launch` in a session of its own, with its output in a file."""

    def __init__(
        self,
        folder: Path,
        log: Path,
        arguments: tuple[str, ...],
        env: dict[str, str],
        enter: tuple[str, ...] = (),
        *,
        is_warm: bool = False,
    ) -> None:
        self._log = log
        env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **env}
        if is_warm and not enter:
            self.process = warm.Started(arguments, cwd=folder, env=env, files=(log, log))
            return
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [*enter, sys.executable, "-m", "launcher", *arguments],
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def until(self, condition, what: str, *, every_s: float = 0.05) -> None:
        """Wait for something to happen to a run that goes on; each look reads its records, and takes from its time."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < end, f"it never came to {what}:\n{self.output}"
            time.sleep(every_s)

    def ends(self, code: int) -> str:
        """Wait for its end; return its output."""
        found = self.process.wait(timeout=DEADLINE_S)
        assert found == code, f"exit code {found}, expected {code}:\n{self.output}"
        assert self.leaves_nobody(), f"outlived by {self.session()}"
        return self.output

    def leaves_nobody(self) -> bool:
        """Whether all of its processes end, where it itself is gone, by themselves in a while."""
        self.process.wait(timeout=DEADLINE_S)
        end = time.monotonic() + 60
        while self.session() and time.monotonic() < end:
            time.sleep(0.1)
        return not self.session()

    def workers(self, run: RunDir) -> list[psutil.Process]:
        """The ranks of the present attempt that have opened their logs, in their order."""
        logs = run.attempt_logs(max((e["attempt"] for e in events(run, "attempt_started")), default=0))
        found: dict[Path, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            # The supervisor adopts loader processes whose rank is gone; of those a rank is the eldest.
            for child in sorted(psutil.Process(self.process.pid).children(), key=lambda child: child.create_time()):
                with contextlib.suppress(OSError):
                    output = Path(f"/proc/{child.pid}/fd/1").readlink()
                    if output.parent == logs:
                        found.setdefault(output, child)
        return [found[log] for log in sorted(found)]

    def session(self) -> list[psutil.Process]:
        """All its living processes."""
        found = []
        for other in psutil.process_iter():
            try:
                if os.getsid(other.pid) == self.process.pid and other.status() != psutil.STATUS_ZOMBIE:
                    found.append(other)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def signal(self, number: signal.Signals) -> None:
        """To all of its processes at once, as a terminal does."""
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        """Whatever is left of it goes."""
        for left in self.session():
            left.kill()
        self.process.wait()


@dataclass(kw_only=True)
class Bench:
    """What the faults of one table share; each gets a folder of its own from it."""

    folder: Path
    """Where all of it happens."""
    kills: int = 5
    """How many kills a run is given at random moments."""
    places: int = 20
    """How many random places of a checkpoint are damaged."""
    chances: int = 1
    """How many disks that keep what chance has them keep are tried at each point."""
    seed: int = 0
    """Of all chance."""
    is_warm: bool = False
    """Whether runs are forked from a process that has imported torch: for the suite, which has little time."""
    _started: list[Launched] = field(default_factory=list)
    _undisturbed: dict[tuple[str, ...], RunDir] = field(default_factory=dict)

    @property
    def photos(self) -> Path:
        """The images; only to read."""
        return self.folder / "photos" if (self.folder / "photos").exists() else write_images(self.folder / "photos")

    def place(self, name: str) -> Path:
        """A new folder."""
        number = sum(1 for _ in self.folder.iterdir())
        made = self.folder / f"{number:03d}-{name}"
        made.mkdir()
        return made

    def launch(self, run: Path, *changes: str, photos: Path | None = None, env=None, enter=()) -> Launched:
        """Start a run of the recipe; ``enter`` comes before the command, to run it elsewhere."""
        data = f"data.path={photos or self.photos}"
        return self._start(run, (str(RECIPE), data, *changes, "--run-dir", str(run)), env or {}, enter)

    def resume(self, run: Path, *arguments: str, env=None) -> Launched:
        """Go on with it."""
        return self._start(run, ("resume", str(run), *arguments), env or {})

    def ask(self, *arguments: str) -> str:
        """What another command of `launch` prints."""
        asked = self._start(self.folder, arguments, {})
        return asked.ends(0)

    def undisturbed(self, *changes: str, photos: Path | None = None) -> RunDir:
        """The run that nothing happens to; made once."""
        if changes not in self._undisturbed:
            path = self.place("undisturbed") / "run"
            self.launch(path, *changes, photos=photos).ends(0)
            self._undisturbed[changes] = RunDir(path)
        return self._undisturbed[changes]

    def _start(
        self, run: Path, arguments: tuple[str, ...], env: dict[str, str], enter: tuple[str, ...] = ()
    ) -> Launched:
        log = self.folder / f"output-{len(self._started)}-{run.name}.txt"
        env = {"OMP_NUM_THREADS": "1", **env}
        started = Launched(self.folder, log, arguments, env, enter, is_warm=self.is_warm)
        self._started.append(started)
        return started

    def close(self) -> None:
        """End what a fault that went wrong has left running."""
        for started in self._started:
            started.close()
        self._started.clear()


def step(run: RunDir) -> int:
    """How far the run has come, by its records."""
    return max((m["step"] for m in read_jsonl(run.metrics)), default=0)


def written(run: RunDir) -> int:
    """The newest step of which the run says that its checkpoint is written."""
    return max((e["step"] for e in events(run, "checkpoint")), default=0)


def state_of(run: RunDir) -> dict:
    """``state.json`` of the last checkpoint."""
    return json.loads((run.last_checkpoint / "state.json").read_text())
