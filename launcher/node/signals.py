"""How a supervisor takes a stop signal: pass it to the workers until they leave; on a second Ctrl-C end at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

from launcher.errors import EXIT_RESUMABLE, InterruptedRunError
from launcher.runs import history
from launcher.system import processes

if TYPE_CHECKING:
    from types import FrameType

    from launcher.runs.run_dir import RunDir

RESEND_S = 1.0

_held: list[int] = []
"""Stop signals that came while no :class:`StopSignals` was entered."""


def hold() -> None:
    """Only note the stop signals of this process where no :class:`StopSignals` is entered; the next one heeds them.

    Else they would end it without a word, or be taken by submitit for its own. What waits meanwhile calls :func:`heed`.
    """
    for number in processes.heeded():
        signal.signal(number, lambda number, _frame: _held.append(number))


def heed(doing: str) -> None:
    """Leave off where a stop signal came since :func:`hold`.

    Args:
        doing: what is left off, as in "waiting for node 1".

    Raises:
        InterruptedRunError: one came.
    """
    if _held:
        raise InterruptedRunError(f"stopped by {signal.Signals(_held[0]).name} while {doing}; nothing was trained")


class StopSignals:
    """Owns the stop signals of this process while it is entered.

    The signal is passed on every second: a worker that was forked a moment ago may not have taken its signals over yet.

    Args:
        run: where the event goes.
        node_rank: which node this is.
        outlives_loss: whether it goes on where another node was lost: then a signal that comes after that is the first.
    """

    def __init__(self, run: RunDir, *, node_rank: int, outlives_loss: bool = False) -> None:
        self._run = run
        self._node_rank = node_rank
        self._outlives_loss = outlives_loss
        self._signal = ("", "")
        self._owner = os.getpid()
        self._stop = threading.Event()
        self._done = threading.Event()
        self._before: dict[int, Any] = {}
        self.reason = ""
        """Why to stop, in words: ``stopped by SIGTERM``."""
        self.cause = ""
        """The same in a run's history: ``preempted``, ``interrupted``, ``time_limit`` or ``lost_node``."""

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return self._stop.is_set()

    def request(self, *, reason: str, cause: str) -> None:
        """Stop as if a signal had come; the first reason counts."""
        if not self.requested:
            self.reason, self.cause = reason, cause
            self._stop.set()

    def forget_loss(self) -> None:
        """A node was lost and the others go on: only a signal that came meanwhile still counts."""
        self._stop.clear()
        self.reason, self.cause = self._signal
        if self.cause:
            self._stop.set()

    def blame(self, lost: str) -> None:
        """A node is gone, which is why the signal came; an empty text: none is."""
        if lost:
            self.reason, self.cause = lost, "lost_node"

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in processes.heeded()}
        threading.Thread(target=self._pass_on, name="stop-signals", daemon=True).start()
        if _held:
            self._on_signal(_held[0], None)
            _held.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._stop.set()  # lets the thread go
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # in a worker that has not taken over yet; it will be told again
            return
        is_first = self._outlives_loss and self.cause == "lost_node" and self._signal == ("", "")
        if self._stop.is_set() and not is_first:
            if number == signal.SIGINT:
                processes.kill_descendants()
                os._exit(EXIT_RESUMABLE)
            return
        name = signal.Signals(number).name
        reason, cause = self._signal = (f"stopped by {name}", history.cause_of_signal(name))
        if is_first:
            self.reason, self.cause = reason, cause
        self.request(reason=reason, cause=cause)
        # The supervisor's streams (console.protect) take this also where the signal interrupted a print.
        print(f"\n{name}: saving a checkpoint and stopping; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self._run.append_event("signal", signal=name, node=self._node_rank)

    def _pass_on(self) -> None:
        telling = processes.telling_signal()
        while self._stop.wait() and not self._done.is_set():
            for pid in processes.children(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, telling)
            self._done.wait(RESEND_S)
