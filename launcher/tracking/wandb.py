"""Tracks a run with Weights & Biases, from rank 0. Training never stops or waits because of it.

All of wandb happens in one daemon thread behind a bounded queue, because ``wandb.init`` takes seconds and, before a
server that hangs, minutes; and each call after it can hang as well. Where the server cannot be used the record is kept
in the run directory, for ``wandb sync``. wandb's service process is stopped or killed before :meth:`Tracker.finish`
returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import textwrap
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.recipe import load as recipes
from launcher.recipe import metrics as recipe_metrics
from launcher.system.redact import redact
from launcher.tracking import wandb_folder, wandb_service
from launcher.tracking.wandb_mode import asked_mode, resolve_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import wandb

    from launcher.plan.launch_plan import LaunchPlan
    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir
    from launcher.tracking.wandb_mode import Mode

DEFAULT_PROJECT = "finetune-launcher"
NOT_UPLOADED = ("optimizer.pt",)  # two thirds of a checkpoint, and only this run can use it
QUEUE_SIZE = 1000
POLL_S = 0.2
STOPPED_S = 1.5
"""Seconds that the end of training waits for wandb after a stop signal."""
FALLBACK_S = 10.0
"""Seconds that an offline record may take to begin if training ends before the server has answered."""
PROBE_S = 10.0
"""Seconds between two checks that wandb's folder can be written."""


class Tracker:
    """A wandb run for a run directory. Every method but :meth:`finish` returns at once; none raises.

    If the server cannot be used, ``warn`` gets one line and the record is kept offline. After any other error ``warn``
    gets one line and tracking is off. With mode ``disabled`` there is no thread and wandb is never
    imported.

    Args:
        run: the run; wandb's own files go to its ``wandb/``.
        recipe: becomes wandb's config, with ``plan`` as one more key.
        plan: its ``run_id`` is the wandb run's id and name, so that a resumed run goes on in the same one.
        warn: called with a line, from whatever thread.
    """

    def __init__(self, run: RunDir, recipe: Recipe, plan: LaunchPlan, warn: Callable[[str], None]) -> None:
        self._run = run
        self._recipe = recipe
        self._plan = plan
        self._numbers = (*recipe_metrics.of(recipe.metrics), "lr", "images_per_s")
        self._warn = warn
        self._queue: queue.Queue[Callable[[wandb.Run], object] | None] = queue.Queue(QUEUE_SIZE)
        self._num_dropped = 0
        self._exit_code = 0
        self._lock = threading.Lock()
        self._off = threading.Event()
        self._contacting = threading.Event()  # the server's first answer is awaited
        self._hurry = threading.Event()  # training is over: do not wait for the answer any longer
        self._folder: Path | None = None  # of the record
        self._probed = 0.0
        self._thread: threading.Thread | None = None
        if asked_mode(recipe.tracking.wandb.mode) == "disabled":
            self._off.set()
            return
        # keep wandb's files out of the home folder; its crash reports need the network at exit
        os.environ.setdefault("WANDB_CACHE_DIR", str(run.wandb / "cache"))
        os.environ.setdefault("WANDB_DATA_DIR", str(run.wandb / "data"))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Plot a line of metrics.jsonl over its step, as ``train/loss``, ``train/lr``, ``val/top1``, ``epoch`` …."""
        copied = dict(record)
        self._put(lambda tracked: tracked.log(_scalars(copied, self._numbers)))

    def summary(self, values: dict[str, Any]) -> None:
        """Note what the run came to, as in ``{"best/val/top1": 0.93, "best/epoch": 7, "best/step": 1200}``."""
        copied = dict(values)
        self._put(lambda tracked: tracked.summary.update(copied))

    def log_checkpoint(self, path: Path, aliases: Sequence[str] = ("best",)) -> None:
        """Upload a checkpoint without its optimizer as the artifact ``model-RUN_ID`` of type model.

        Its files are not copied first: it has to stay where it is until :meth:`finish` (the best one does).
        """
        folder = path.resolve()
        name, metadata = f"model-{self._plan.run_id}", {"checkpoint": folder.name}
        self._put(lambda tracked: self._log_folder(tracked, folder, name, metadata, list(aliases)))

    def log_exports(self) -> None:
        """Upload exports/ as the artifact ``exports-RUN_ID``; note its numbers as ``exports/onnx/top1`` ….

        See :func:`log_exports`.
        """
        self._put(self._log_exports)

    def finish(self, timeout_s: float, *, exit_code: int = 0, stop: Callable[[], bool] = lambda: False) -> None:
        """Send what is queued, end the wandb run and its service process; kill that after ``timeout_s`` seconds.

        Args:
            timeout_s: how long to wait; up to two seconds more where a process has to be killed, and ``FALLBACK_S``
                more where the record is then kept offline.
            exit_code: not 0 marks the wandb run as failed.
            stop: whether a stop signal came; the wait is then short.
        """
        if self._thread is None:
            return
        self._exit_code = exit_code
        self._put(None)
        self._join(timeout_s, stop)
        if self._thread.is_alive() and self._contacting.is_set():
            self._hurry.set()
            wandb_service.kill()  # which ends the wait for the server
            self._join(FALLBACK_S, stop)
        if self._thread.is_alive():
            self._turn_off(f"wandb: not done after {timeout_s:g} s and given up", "given up at the end of training")
            wandb_service.kill()
        self._off.set()

    def _join(self, timeout_s: float, stop: Callable[[], bool]) -> None:
        """Wait for the thread; after a stop signal, only ``STOPPED_S``."""
        assert self._thread  # noqa: S101  there is something to wait for
        deadline, stopped = time.monotonic() + timeout_s, False
        while self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            self._thread.join(min(left, POLL_S))
            if stop() and not stopped:
                deadline, stopped = min(deadline, time.monotonic() + STOPPED_S), True

    def _put(self, action: Callable[[wandb.Run], object] | None) -> None:
        while not self._off.is_set():
            try:
                self._queue.put_nowait(action)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._queue.get_nowait()
                self._num_dropped += 1
                if self._num_dropped == 1:
                    self._say(f"wandb: too slow, its oldest records are dropped; {self._run.metrics} has them all")
            else:
                return

    def _turn_off(self, line: str, reason: str) -> None:
        """Warn with ``line`` and the command that sends the record; ``reason``: why the server lacks it."""
        with self._lock:  # the thread and finish() may both be here; the first one speaks
            if not self._off.is_set():
                self._off.set()
                self._say(line + self._unsent(reason))

    def _unsent(self, reason: str) -> str:
        """Record that the server lacks some of the record; return the command that sends it."""
        if self._folder is None:
            return ""
        with contextlib.suppress(OSError):
            self._run.append_event(wandb_folder.UNSYNCED, folder=self._folder.name, reason=reason)
        return f"; `{wandb_folder.sync_command([self._folder])}` sends what is recorded"

    def _say(self, line: str) -> None:
        with contextlib.suppress(Exception):  # a failure to print a line about wandb must not matter
            self._warn(line)

    def _work(self) -> None:
        """The thread: all of wandb, from the import to the end of its service process."""
        try:
            mode, reason = resolve_mode(self._recipe.tracking.wandb.mode)
            if mode == "disabled":
                self._turn_off(f"wandb: off: {reason}", "off")
                return
            tracked = self._begin(mode, reason)
            while action := self._queue.get():
                self._check_folder()
                action(tracked)
            self._check_folder()
            tracked.finish(exit_code=self._exit_code)
            sys.modules["wandb"].teardown()
            if self._folder and mode == "online" and (problem := wandb_folder.upload_error(self._folder)):
                self._turn_off(f"wandb: not all was sent: {problem}", problem)
        except BaseException as error:  # SystemExit as well, which wandb raises where its service failed
            self._turn_off(_describe(error), _one_line(error))
            wandb_service.end()

    def _begin(self, mode: Mode, reason: str | None) -> wandb.Run:
        """Start the record: online, or offline where the server cannot be used, which is said with its reason."""
        self._check_folder()
        if mode == "online":
            self._contacting.set()
            try:
                return self._start("online")
            except BaseException as error:  # a wrong key, a server that is down or slow: the record can be kept here
                self._stop_if_finished()
                reason = "the server gave no answer" if self._hurry.is_set() else _one_line(error)
                wandb_service.end()
            finally:
                self._contacting.clear()
        tracked = self._start("offline")
        if reason:
            self._say(f"wandb: offline: {reason}; training goes on{self._unsent(reason)}")
        return tracked

    def _check_folder(self) -> None:
        if time.monotonic() - self._probed > PROBE_S:
            wandb_folder.check_writable(self._run.wandb)
            self._probed = time.monotonic()

    def _start(self, mode: Mode) -> wandb.Run:
        import wandb

        options = wandb_service.settings(mode, self._say)
        self._stop_if_finished(mode)
        wandb_service.start(options)
        self._stop_if_finished(mode)
        config = {**recipes.to_dict(self._recipe), "plan": self._plan.to_dict() | asdict(self._run.read_launched())}
        tracked = wandb.init(
            id=self._plan.run_id,
            name=self._plan.run_id,
            project=self._recipe.tracking.wandb.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            entity=self._recipe.tracking.wandb.entity,  # None: WANDB_ENTITY, or the key's own
            dir=str(self._run.path),
            config=json.loads(json.dumps(config, default=str)),
            resume="allow",
            allow_val_change=True,  # a resumed run may have another plan
            settings=options,
        )
        self._folder = Path(tracked.settings.sync_dir)
        # Over our own step, never wandb's: that only grows, and steps that come again after a resume would be lost.
        tracked.define_metric("step")
        for pattern in ("train/*", "val/*", "epoch"):
            tracked.define_metric(pattern, step_metric="step")
        return tracked

    def _stop_if_finished(self, mode: Mode = "offline") -> None:
        if self._off.is_set() or (mode == "online" and self._hurry.is_set()):
            raise InterruptedError("finished before it began")

    def _log_exports(self, tracked: wandb.Run) -> None:
        manifest = json.loads(self._run.export_manifest.read_text(encoding="utf-8"))
        name = f"exports-{self._plan.run_id}"
        self._log_folder(tracked, self._run.exports, name, manifest, ["latest"])
        for export in [manifest["reference"], *manifest["exports"]]:
            numbers = {key: value for key, value in export.items() if isinstance(value, (bool, int, float))}
            tracked.summary.update({f"exports/{export['format']}/{key}": value for key, value in numbers.items()})

    def _log_folder(
        self, tracked: wandb.Run, folder: Path, name: str, metadata: dict[str, Any], aliases: list[str]
    ) -> None:
        import wandb

        files = sorted(f for f in folder.glob("*") if f.is_file() and f.name not in NOT_UPLOADED)
        if not files:
            self._say(f"wandb: {folder}: nothing there to upload")
            return
        artifact = wandb.Artifact(name, type="model", metadata=metadata)
        for file in files:
            # Sent from where it lies: a copy in the home folder, which is wandb's default, can fill a quota.
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
        tracked.log_artifact(artifact, aliases=aliases)


def log_exports(run: RunDir, warn: Callable[[str], None], *, timeout_s: float = 600.0) -> None:
    """Add the exported models to the wandb run that training made; for the post-step. Never raises.

    Args:
        run: a run with exports/manifest.json.
        warn: called with one line where something went wrong.
        timeout_s: how long the upload may take.
    """
    try:
        tracker = Tracker(run, recipes.read_resolved(run.recipe), run.read_plan(), warn)
        tracker.log_exports()
        tracker.finish(timeout_s)
    except Exception as error:  # wandb must not fail the post-step
        warn(_describe(error))


def _scalars(record: dict[str, Any], numbers: Sequence[str]) -> dict[str, Any]:
    """A line of metrics.jsonl as wandb's names and values."""
    split = record["split"]
    values = {f"{split}/{name}": record[name] for name in numbers if record.get(name) is not None}
    return {**values, "epoch": record["epoch"], "step": record["step"]}


def _describe(error: BaseException) -> str:
    return f"wandb: off: {_one_line(error)}; training goes on, and metrics.jsonl has every number"


def _one_line(error: BaseException) -> str:
    return textwrap.shorten(redact(f"{type(error).__name__}: {error}"), 300, placeholder=" …")
