"""How the training loop is left: by a stop signal, for which it looks at a flag between steps, or by an exception."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

from launcher.errors import EXIT_FAILED, EXIT_RESUMABLE
from launcher.system.processes import heeded, telling_signal

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

POLL_S = 0.5
LEAVE_S = 3.0
"""How long a worker that was told to stop before its first step may go on to wait for the others."""


class StopFlag:
    """Set by the first stop signal. A checkpoint is never made in a signal handler, where it would hang.

    torch's agent ends the peers of a failed worker with SIGTERM, the same signal that elsewhere means "save and leave".
    They could do neither: they wait for the one that is gone, in C code that no Python handler interrupts. So a thread
    hears of the signal (through the wake-up descriptor) and ends the process if a peer's failure is what it is about,
    or where it has not begun to train: there is nothing to save, and those that it waits for may never come.

    Args:
        peer_failed: whether another worker of this attempt has left an error file; None where there are no others.
    """

    def __init__(self, peer_failed: Callable[[], bool] | None = None) -> None:
        self._set = False
        self._peer_failed = peer_failed
        self.trains = False
        """Whether the training loop has looked at the flag; from then on all ranks agree on where to stop."""

    def __call__(self) -> bool:
        """Whether to stop."""
        return self._set

    def install(self) -> None:
        """Take the stop signals over for this process."""
        for number in heeded():
            signal.signal(number, self._on_signal)
        if self._peer_failed is not None:
            read_end, write_end = os.pipe2(os.O_NONBLOCK)
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
            os.set_blocking(read_end, True)
            threading.Thread(target=self._watch, args=(read_end,), name="stop-flag", daemon=True).start()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._set and self._peer_failed is None and number == signal.SIGINT:
            os._exit(128 + number)  # nobody above us counts the second Ctrl-C
        self._set = True

    def _watch(self, read_end: int) -> None:
        told = telling_signal()
        while told not in os.read(read_end, 64):
            pass
        since = time.monotonic()
        while not (self._peer_failed and self._peer_failed()):
            if not self.trains and time.monotonic() - since > LEAVE_S:
                os._exit(EXIT_RESUMABLE)
            time.sleep(POLL_S)
        os._exit(EXIT_FAILED)


class StopTraining(Exception):  # noqa: N818  a signal to leave the loops, no error
    """All ranks agreed to stop here."""


class RollBack(Exception):  # noqa: N818  a signal to leave the loops, no error
    """All ranks go back to the last checkpoint, and do without ``step`` from then on."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class Redeal(Exception):  # noqa: N818  a signal to leave the loops, no error
    """Memory ran out on some rank: from here on it takes smaller batches, and all have to know."""
