"""Starts and ends wandb-core, the process in which wandb does its work, without waiting for it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import EXIT_RESUMABLE
from launcher.system import waiting
from launcher.system.processes import children, descendants, start_time
from launcher.tracking.wandb_mode import configured_url

if TYPE_CHECKING:
    from collections.abc import Callable

    import wandb

    from launcher.tracking.wandb_mode import Mode

INIT_TIMEOUT_S = 30.0
"""Seconds that ``wandb.init`` may wait for its server, where ``WANDB_INIT_TIMEOUT`` says nothing else."""
KILL_TIMEOUT_S = 2.0
LOOK_S = 0.5
"""Seconds between two looks whether it lives."""
_watch = threading.Event()
"""Set where the service is watched no longer."""
_watch.set()
_is_lost: Callable[[], bool] = bool
"""Whether the service that was started is gone; false where there is none."""


def settings(mode: Mode, warn: Callable[[str], None], *, watch_machine: bool = True) -> wandb.Settings:
    """Settings of wandb, without those that an older version lacks.

    Args:
        mode: online or offline.
        warn: called with a line, later.
        watch_machine: whether wandb records this machine's load; a login node's says nothing of the run.
    """
    import wandb

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
        "init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_TIMEOUT_S),
        "x_disable_stats": not watch_machine,
        "x_transaction_log_flush_interval": 2.0,  # what a service that has to be killed may lose
        # By default the stop button of wandb's page sends SIGINT to this process.
        "stop_fn": lambda: warn("wandb: its stop button does not stop training; `launch cancel RUN` does"),
    }
    values |= {"base_url": url} if (url := configured_url()) else {}
    return wandb.Settings(**{key: v for key, v in values.items() if key in wandb.Settings.model_fields})


def start(options: wandb.Settings) -> None:
    """Start the service without its exit hook, before ``wandb.init``, which may hang.

    The hook would wait until all is sent, however long that takes. wandb has no public way to leave it out.
    """
    global _watch, _is_lost  # noqa: PLW0603  a process has one service
    import wandb

    service = wandb.setup(options)
    if unregister_exit_hook := getattr(getattr(service, "_connection", None), "_cleanup", None):
        unregister_exit_hook()
    if core := _process():
        _watch = threading.Event()
        arguments = core, start_time(core), _watch
        threading.Thread(target=_end_with, args=arguments, name="wandb-core", daemon=True).start()
        _is_lost = functools.partial(_is_gone, core, start_time(core))


def leave() -> None:
    """From here on the service may end."""
    _watch.set()


def _end_with(core: int, began: str | None, over: threading.Event) -> None:
    """End this process where the service was killed: wandb itself does not tell, and waits for it for ever.

    On a signal to every process of a job the service ends, whatever this process does with that. Another tracker then
    goes on from what was sent.
    """
    while not over.wait(LOOK_S):
        if _is_gone(core, began):
            _end_without_it()


def _is_gone(core: int, began: str | None) -> bool:
    return began is None or start_time(core) != began


def _end_without_it() -> None:
    with contextlib.suppress(OSError):  # a full disk
        print("wandb-core, wandb's own process, was killed", file=sys.stderr, flush=True)
    os._exit(EXIT_RESUMABLE)


def _process() -> int | None:
    """Id of wandb-core, a child of this process; None: there is none."""
    return next((core for core in children(os.getpid()) if _name(core) == "wandb-core"), None)


def end() -> None:
    """Kill the service and have wandb forget it: wandb still has threads for it.

    Where the service was killed before, which wandb tells as any error, this process ends, as said above.
    """
    waiting.wait_until(lambda: _watch.is_set() or _is_lost(), timeout_s=2 * LOOK_S, heed=lambda: None)
    if not _watch.is_set() and _is_lost():
        _end_without_it()
    leave()
    logging.getLogger("wandb").handlers = [logging.NullHandler()]  # its last log lines may meet a full disk
    kill()
    with contextlib.suppress(BaseException):
        sys.modules["wandb"].teardown()


def kill() -> None:
    """Kill wandb-core, a child of this process, with what it started (the system monitor), and wait for its end."""
    core = _process()
    if core is None:
        return
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
