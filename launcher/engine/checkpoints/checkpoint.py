"""Checkpoints: whole or not there (invariant 4). Written beside, hashed, fsynced, renamed; verified before use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from launcher.engine.non_finite import non_finite_names
from launcher.errors import TrainingError
from launcher.recipe.run_weights import AVERAGES
from launcher.runs import generations
from launcher.system.files import fsync, write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launcher.runs.run_dir import RunDir

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.pt", "state.json", "manifest.json"
AVERAGE = "ema.safetensors"
"""The averaged weights, where there are some."""
FILES = (MODEL, OPTIMIZER, STATE)
REPLACED = ".old"
RETRY_S = 30.0
"""Seconds after which a checkpoint that could not be written is tried again."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of training after a step. Tensors are on the host."""

    step: int
    """Optimizer steps done."""
    model: dict[str, torch.Tensor]
    """The model's state dict."""
    optimizer: dict[str, Any]
    """State dicts of the optimizer and the gradient scaler."""
    state: dict[str, Any]
    """The rest, as JSON: position, best value, sums of the epoch under way."""
    average: dict[str, torch.Tensor] | None = None
    """The model's state dict with averaged weights (train.ema, train.swa); None: there are none."""
    arrived: Callable[[], Any] = field(default=lambda: None, compare=False)
    """Waits until the tensors are copied: their copy may still be under way."""

    @property
    def best_weights(self) -> dict[str, torch.Tensor]:
        """The weights that are the better ones of this checkpoint: the model's, or the average of them."""
        best = self.state["early_stopping"]["best"] or {}
        return self.average if self.average is not None and best.get("weights") in AVERAGES else self.model


class CheckpointError(TrainingError):
    """A checkpoint is damaged or missing."""


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, so that training never waits for the disk; for rank 0.

    While one is written, the next waits; one that is not begun when a newer one comes gives way to it, but for the best
    one. So there are at most three copies on the host. One that the disk does not take is tried again, at the latest
    when the next one comes; those that are there stay as they are.

    Args:
        run: where to.
        keep: how many of the newest stay; the best stays besides.
        on_written: called in the thread with (step, seconds, size_mb, best) after each.
        on_failed: called in the thread with (step, what went wrong) after each attempt that failed.
        on_done: called in the thread with each checkpoint that is not needed any more.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        keep: int,
        on_written: Callable[[int, float, float, bool], None],
        on_failed: Callable[[int, str], None],
        on_done: Callable[[Checkpoint], None],
    ) -> None:
        self._run = run
        self._keep = keep
        self._on_written = on_written
        self._on_failed = on_failed
        self._on_done = on_done
        self._changed = threading.Condition()
        self._waiting: dict[bool, Checkpoint] = {}  # by whether it is the best; each the newest of its kind
        self._writing = False
        self._last_step = 0
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        _clean_up(run)

    def save(self, checkpoint: Checkpoint, *, best: bool) -> None:
        """Write a checkpoint soon, in the thread."""
        with self._changed:
            given_up = [self._waiting.pop(best, None), self._waiting.pop(False, None) if best else None]
            self._waiting[best] = checkpoint  # the best one is also the last
            self._changed.notify_all()
        for one in filter(None, given_up):
            self._on_done(one)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
            self._thread.start()

    def go_on(self, step: int, *, best: int | None) -> None:
        """Make ``last`` and ``best`` point to the checkpoints that training goes on from.

        An attempt that was killed may not have come to that, and another one may have damaged what they lead to.

        Args:
            step: of the last one.
            best: step of the best one, if there is any; where it is gone the link stays.
        """
        for link, target in ((self._run.last_checkpoint, step), (self._run.best_checkpoint, best)):
            if target is not None and self._run.checkpoint(target).exists():
                _point(link, self._run.checkpoint(target))

    def wait(self) -> None:
        """Wait until everything that was saved is on the disk.

        Raises:
            CheckpointError: the disk did not take it, also not when it was tried once more now.
        """
        with self._changed:
            if self._failure is not None:
                self._failure = None
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure is not None or not (self._waiting or self._writing))
            if self._failure is not None:
                raise CheckpointError(f"{self._run.checkpoints}: {self._failure}")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                best = True in self._waiting
                checkpoint = self._waiting.pop(best)
                self._writing = True
            failure = self._write(checkpoint, best=best)
            with self._changed:
                self._writing = False
                self._failure = failure
                newer = any(waiting.step >= checkpoint.step for waiting in self._waiting.values())
                again = failure and (best not in self._waiting if best else not newer)
                if again:
                    self._waiting[best] = checkpoint
                else:
                    self._on_done(checkpoint)
                self._changed.notify_all()
                if failure:
                    self._changed.wait(RETRY_S)

    def _write(self, checkpoint: Checkpoint, *, best: bool) -> str | None:
        """Write one; return what went wrong."""
        try:
            checkpoint.arrived()
            start = time.monotonic()
            folder = write(self._run, checkpoint)
            generations.leave_if_over()
            if checkpoint.step >= self._last_step:
                _point(self._run.last_checkpoint, folder)
                self._last_step = checkpoint.step
            if best:
                _point(self._run.best_checkpoint, folder)
            self._remove_old()
            size_mb = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
        except Exception as error:  # torch and safetensors raise different types for a full disk
            failure = f"the checkpoint of step {checkpoint.step} could not be written: {_first_line(error)}"
            self._on_failed(checkpoint.step, failure)
            return failure
        self._on_written(checkpoint.step, time.monotonic() - start, size_mb, best)
        return None

    def _remove_old(self) -> None:
        kept = {self._run.best_checkpoint.resolve().name, self._run.last_checkpoint.resolve().name}
        for folder in _newest_first(self._run)[self._keep :]:
            if folder.name not in kept:
                shutil.rmtree(folder)


def write(run: RunDir, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, whole or not at all; return its folder."""
    target = run.checkpoint(checkpoint.step)
    beside = target.with_name(f".{target.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name, tensors in ((MODEL, checkpoint.model), (AVERAGE, checkpoint.average)):
        if tensors is not None:
            # safetensors refuses tensors that share memory; a state dict may hold one under two names.
            save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, beside / name)
    torch.save(checkpoint.optimizer, beside / OPTIMIZER)
    write_json_atomic(beside / STATE, checkpoint.state)
    names = [*FILES, *([AVERAGE] if checkpoint.average is not None else [])]
    write_json_atomic(beside / MANIFEST, {"version": 1, "files": {f: _describe(beside / f) for f in names}})
    for file in (*beside.iterdir(), beside):
        fsync(file)
    old = target.with_name(f".{target.name}{REPLACED}")
    generations.leave_if_over()
    if target.exists():  # the same step once more: at the end of an epoch, or after a resume from the one before it
        target.rename(old)
    beside.rename(target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return target


def verify(folder: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        CheckpointError: says which file is missing or damaged.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        names = [*FILES, *([AVERAGE] if AVERAGE in found else [])]
        files = {name: {"bytes": found[name]["bytes"], "sha256": str(found[name]["sha256"])} for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no readable {MANIFEST}: {error}") from None
    for name, expected in files.items():
        try:
            found = _describe(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: {error.strerror}") from None
        if found != expected:
            raise CheckpointError(
                f"{folder / name}: damaged ({found['bytes']} bytes, expected {expected['bytes']}; "
                f"sha256 {found['sha256'][:12]}…, expected {expected['sha256'][:12]}…)"
            )


def load(folder: Path) -> Checkpoint:
    """Verify and read one checkpoint; nothing in it is ever executed (safetensors, ``weights_only``).

    Raises:
        CheckpointError: it is damaged, holds more than numbers and tensors, or weights that are NaN or infinite.
    """
    verify(folder)
    try:
        state = read_state(folder)
        optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        model = load_file(folder / MODEL)
        average = load_file(folder / AVERAGE) if (folder / AVERAGE).exists() else None
        loaded = Checkpoint(step=state["step"], model=model, average=average, optimizer=optimizer, state=state)
    except Exception as error:  # the hashes are right, so the file was made like this; its bytes may raise anything
        raise CheckpointError(f"{folder}: is as its manifest says, but refused: {_first_line(error)}") from error
    names = non_finite_names(model)
    if names:
        raise CheckpointError(f"{folder / MODEL}: NaN or infinite values in {len(names)} tensors, as {names[0]}")
    return loaded


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def load_newest(run: RunDir) -> Checkpoint | None:
    """The newest whole checkpoint, or None; damaged ones are skipped, each with an event."""
    for folder in _newest_first(run):
        try:
            return load(folder)
        except CheckpointError as error:
            run.append_event("checkpoint_rejected", path=str(folder), message=str(error))
    return None


def _clean_up(run: RunDir) -> None:
    """Remove the temporary files of an attempt that died in :func:`write`; restore the checkpoint it had set aside."""
    for left in run.checkpoints.glob(".step-*"):
        target = left.with_name(left.name.removeprefix(".").removesuffix(REPLACED))
        if left.suffix == REPLACED and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _newest_first(run: RunDir) -> list[Path]:
    return sorted(run.checkpoints.glob("step-*"), reverse=True)


def _point(link: Path, folder: Path) -> None:
    beside = link.with_name(f".{link.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    beside.symlink_to(folder.name)
    if link.is_dir() and not link.is_symlink():  # the run directory was copied by something that follows links
        shutil.rmtree(link)
    beside.replace(link)
    fsync(link.parent)  # before what it pointed to is removed


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
