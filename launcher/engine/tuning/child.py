"""Calls a function in a forked process, so that its memory and its end do not affect this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from launcher.engine.device import is_out_of_memory
from launcher.errors import EXIT_FAILED, EXIT_OK, LaunchError, TrainingError
from launcher.system.processes import STOP_SIGNALS, die_with_parent, offer_to_kernel

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

POLL_S = 0.1
GROUP_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
"""By which a process joins the run's process group; a child forms one of its own."""


class OutOfMemoryError(Exception):
    """The child ran out of memory: it said so, or the kernel killed it."""


class TooSlowError(Exception):
    """The child was not done in time."""


def call_in_child(function: Callable[[], Any], *, timeout_s: float, heed_stop: Callable[[], None]) -> Any:
    """What ``function`` returns, called in a forked child.

    Args:
        function: what it returns is pickled.
        timeout_s: after which the child is killed.
        heed_stop: called again and again while the child runs; when it raises, the child is killed.

    Raises:
        OutOfMemoryError: there was not enough memory.
        TooSlowError: it took longer than ``timeout_s``.
        TrainingError: the function failed; has its traceback.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_main, args=(sender, function), name="probe")
    child.start()
    sender.close()
    deadline = time.monotonic() + timeout_s
    try:
        while not receiver.poll(POLL_S):
            heed_stop()
            if time.monotonic() > deadline:
                raise TooSlowError(f"not done after {timeout_s:g} s")
        kind, value = receiver.recv()
    except (EOFError, OSError):  # OSError if it was killed in the middle of a message
        child.join()
        if child.exitcode == -signal.SIGKILL:
            raise OutOfMemoryError("killed, as the kernel does with a process when memory has run out") from None
        raise TrainingError(
            f"a probe of the batch size ended with exit code {child.exitcode}, without a word"
        ) from None
    finally:
        child.kill()
        child.join()
        receiver.close()
    if kind == "memory":
        raise OutOfMemoryError(value)
    if kind == "usage":
        raise TrainingError(value)
    if kind == "error":
        raise TrainingError(f"a probe of the batch size failed:\n{value}")
    return value


def _main(sender: Connection, function: Callable[[], Any]) -> None:
    die_with_parent()
    signal.set_wakeup_fd(-1)  # the rank's
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the rank hears them too, and ends this process
    offer_to_kernel(1000)
    for name in GROUP_VARIABLES:
        os.environ.pop(name, None)
    # OpenMP keeps a pool for each thread that computes: this one's, if any, stayed in the process that was forked.
    computing = threading.Thread(target=_answer, args=(sender, function))
    computing.start()
    computing.join()


def _answer(sender: Connection, function: Callable[[], Any]) -> None:
    try:
        sender.send(("value", function()))
        code = EXIT_OK
    except BaseException as error:  # the rank must learn of any failure
        kind = "memory" if is_out_of_memory(error) else "usage" if isinstance(error, LaunchError) else "error"
        text = traceback.format_exc() if kind == "error" else str(error)
        del error
        sender.send((kind, text))
        code = EXIT_FAILED
    os._exit(code)
