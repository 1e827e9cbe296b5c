"""Weights & Biases, from rank 0: whatever it does, training neither stops nor waits for it.

All of wandb happens in one daemon thread behind a bounded queue, because ``wandb.init`` takes seconds and, before a
server that hangs, minutes; and each call after it can hang as well. Its service process (wandb-core) is stopped or
killed before :meth:`Tracker.finish` returns, and the exit hook that would wait for it is taken out.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import recipe as recipes
from launcher.engine.wandb_mode import asked_mode, configured_url, resolve_mode
from launcher.processes import children, descendants

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import wandb

    from launcher.engine.wandb_mode import Mode
    from launcher.recipe import Recipe
    from launcher.run_dir import RunDir

DEFAULT_PROJECT = "finetune-launcher"
NUMBERS = ("loss", "top1", "top5", "f1", "lr", "images_per_s")
NOT_UPLOADED = ("optimizer.pt",)  # two thirds of a checkpoint, and of use to nobody but this run
QUEUE_SIZE = 1000
INIT_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 2.0


class Tracker:
    """A wandb run that follows a run directory. Every method returns at once, but for :meth:`finish`; none raises.

    What goes wrong becomes one line to ``warn``, and tracking is off from then on. With mode ``disabled`` there is no
    thread and wandb is never imported.

    Args:
        run: the run; wandb's own files go to its ``wandb/``.
        recipe: becomes wandb's config, with ``plan`` as one more key.
        plan: its ``run_id`` is the wandb run's id and name, so that a resumed run goes on in the same one.
        warn: called with a line, from whatever thread.
    """

    def __init__(self, run: RunDir, recipe: Recipe, plan: dict[str, Any], warn: Callable[[str], None]) -> None:
        self._run = run
        self._recipe = recipe
        self._plan = plan
        self._warn = warn
        self._queue: queue.Queue[Callable[[wandb.Run], object] | None] = queue.Queue(QUEUE_SIZE)
        self._num_dropped = 0
        self._exit_code = 0
        self._lock = threading.Lock()
        self._off = threading.Event()
        self._thread: threading.Thread | None = None
        if asked_mode(recipe.tracking.wandb.mode) == "disabled":
            self._off.set()
            return
        # What wandb would put into the home folder; and its crash reports, which need the network at exit.
        os.environ.setdefault("WANDB_CACHE_DIR", str(run.wandb / "cache"))
        os.environ.setdefault("WANDB_DATA_DIR", str(run.wandb / "data"))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Plot a line of metrics.jsonl over its step, as ``train/loss``, ``train/lr``, ``val/top1``, ``epoch`` …."""
        copied = dict(record)
        self._put(lambda tracked: tracked.log(_scalars(copied)))

    def summary(self, values: dict[str, Any]) -> None:
        """Note what the run came to, as in ``{"best/val/top1": 0.93, "best/epoch": 7, "best/step": 1200}``."""
        copied = dict(values)
        self._put(lambda tracked: tracked.summary.update(copied))

    def log_checkpoint(self, path: Path, aliases: Sequence[str] = ("best",)) -> None:
        """Upload a checkpoint without its optimizer as the artifact ``model-RUN_ID`` of type model.

        Its files are not copied first: it has to stay where it is until :meth:`finish` (the best one does).
        """
        folder = path.resolve()
        name, metadata = f"model-{self._plan['run_id']}", {"checkpoint": folder.name}
        self._put(lambda tracked: self._log_folder(tracked, folder, name, metadata, list(aliases)))

    def log_exports(self) -> None:
        """Upload exports/ as the artifact ``exports-RUN_ID``; note its numbers as ``exports/onnx/top1`` ….

        See :func:`log_exports`.
        """
        self._put(self._log_exports)

    def finish(self, timeout_s: float, *, exit_code: int = 0) -> None:
        """Send what is queued, end the wandb run and its service process; kill that after ``timeout_s`` seconds.

        Args:
            timeout_s: how long to wait; up to two seconds more where a process has to be killed.
            exit_code: not 0 marks the wandb run as failed.
        """
        if self._thread is None:
            return
        self._exit_code = exit_code
        self._put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            cure = f"`wandb sync {self._run.wandb}/*run-*` sends the rest"
            self._turn_off(f"wandb: not done after {timeout_s:g} s and given up; {cure}")
            _kill_service()
        self._off.set()

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

    def _turn_off(self, line: str | None) -> None:
        with self._lock:  # the thread and finish() may both be here; the first one speaks
            if not self._off.is_set():
                self._off.set()
                if line:
                    self._say(line)

    def _say(self, line: str) -> None:
        with contextlib.suppress(Exception):  # wandb is not worth a failure of whoever prints it
            self._warn(line)

    def _work(self) -> None:
        """The thread: all of wandb, from the import to the end of its service process."""
        try:
            mode, reason = resolve_mode(self._recipe.tracking.wandb.mode)
            if mode == "disabled":
                self._turn_off(reason)
                return
            tracked = self._start(mode)
            while action := self._queue.get():
                action(tracked)
            tracked.finish(exit_code=self._exit_code)
            sys.modules["wandb"].teardown()
        except BaseException as error:  # SystemExit as well, which wandb raises where its service failed
            self._turn_off(_describe(error))
            _kill_service()
            with contextlib.suppress(BaseException):
                sys.modules["wandb"].teardown()  # it still has threads, and knows of a service that is gone

    def _start(self, mode: Mode) -> wandb.Run:
        import wandb

        values = _settings(mode, self._say)
        settings = wandb.Settings(**{key: v for key, v in values.items() if key in wandb.Settings.model_fields})
        self._stop_if_finished()
        # The service first, by itself: it comes with an exit hook that waits until all is sent, however long that
        # takes, and init may hang. wandb has no public way to leave that hook out.
        service = wandb.setup(settings)
        if unregister_exit_hook := getattr(getattr(service, "_connection", None), "_cleanup", None):
            unregister_exit_hook()
        self._stop_if_finished()
        config = {**recipes.to_dict(self._recipe), "plan": self._plan}
        tracked = wandb.init(
            id=self._plan["run_id"],
            name=self._plan["run_id"],
            project=self._recipe.tracking.wandb.project or DEFAULT_PROJECT,
            entity=self._recipe.tracking.wandb.entity,
            dir=str(self._run.path),
            config=json.loads(json.dumps(config, default=str)),
            resume="allow",
            allow_val_change=True,  # a resumed run may have another plan
            settings=settings,
        )
        # Over our own step, never wandb's: that only grows, and steps that come again after a resume would be lost.
        tracked.define_metric("step")
        for pattern in ("train/*", "val/*", "epoch"):
            tracked.define_metric(pattern, step_metric="step")
        return tracked

    def _stop_if_finished(self) -> None:
        if self._off.is_set():
            raise InterruptedError("finished before it began")

    def _log_exports(self, tracked: wandb.Run) -> None:
        manifest = json.loads(self._run.export_manifest.read_text(encoding="utf-8"))
        name = f"exports-{self._plan['run_id']}"
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
    except Exception as error:  # a record of the exports elsewhere is not worth a failed post-step
        warn(_describe(error))


def _settings(mode: Mode, warn: Callable[[str], None]) -> dict[str, Any]:
    """Settings of wandb, some of which older versions lack."""
    values: dict[str, Any] = {
        "mode": mode,
        "silent": True,
        "console": "off",  # logs/ has what the ranks print
        "save_code": False,
        "disable_code": True,
        "disable_git": True,  # on a large or remote checkout git takes its time
        "label_disable": True,
        "sagemaker_disable": True,  # it would replace the run's id
        "reinit": "create_new",
        "init_timeout": INIT_TIMEOUT_S,
        "x_transaction_log_flush_interval": 2.0,  # what a service that has to be killed may lose
        # By default the stop button of wandb's page sends SIGINT to this process.
        "stop_fn": lambda: warn("wandb: its stop button does not stop training; `launch cancel RUN` does"),
    }
    return values | ({"base_url": url} if (url := configured_url()) else {})


def _scalars(record: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl as wandb's names and values."""
    split = record["split"]
    values = {f"{split}/{name}": record[name] for name in NUMBERS if record.get(name) is not None}
    return {**values, "epoch": record["epoch"], "step": record["step"]}


def _kill_service() -> None:
    """Kill wandb-core, a child of this process, with what it started (the system monitor), and wait for its end."""
    for core in children(os.getpid()):
        if _name(core) == "wandb-core":
            for pid in (*descendants(core), core):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until = time.monotonic() + KILL_TIMEOUT_S
            with contextlib.suppress(ChildProcessError):  # wandb's own thread may reap it first
                while os.waitpid(core, os.WNOHANG) == (0, 0) and time.monotonic() < until:
                    time.sleep(0.01)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _describe(error: BaseException) -> str:
    message = str(error).strip().partition("\n")[0]
    return f"wandb: off: {type(error).__name__}: {message}; training goes on, and metrics.jsonl has every number"
