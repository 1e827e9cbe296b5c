"""How a supervisor takes a stop signal: pass it to the workers until they leave; on a second Ctrl-C end at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Self

from launcher import history, processes
from launcher.errors import EXIT_RESUMABLE

if TYPE_CHECKING:
    from types import FrameType

    from launcher.run_dir import RunDir

RESEND_S = 1.0

_held: list[int] = []
"""Stop signals that came while nobody could do anything about them."""


def hold() -> None:
    """Only note the stop signals of this process where no :class:`StopSignals` is entered; the next one heeds them.

    Else they would end it without a word, or be taken by submitit for its own.
    """
    for number in processes.STOP_SIGNALS:
        signal.signal(number, lambda number, _frame: _held.append(number))


class StopSignals:
    """Owns the stop signals of this process while it is entered.

    The signal is passed on every second: a worker that was forked a moment ago may not have taken its signals over yet.

    Args:
        run: where the event goes.
        node_rank: which node this is.
    """

    def __init__(self, run: RunDir, *, node_rank: int) -> None:
        self._run = run
        self._node_rank = node_rank
        self._owner = os.getpid()
        self._stop = threading.Event()
        self._done = threading.Event()
        self._before: dict[int, Any] = {}
        self._name = ""

    @property
    def requested(self) -> bool:
        """Whether a stop signal has come."""
        return self._stop.is_set()

    @property
    def name(self) -> str:
        """The signal that came, as in SIGTERM; where a worker on another node was told and none came here: a peer."""
        return self._name or "the signal of another node"

    @property
    def cause(self) -> str:
        """What the signal means in a run's history."""
        return history.cause_of_signal(self._name)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in processes.STOP_SIGNALS}
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
        if self._stop.is_set():
            if number == signal.SIGINT:
                processes.kill_descendants()
                os._exit(EXIT_RESUMABLE)
            return
        self._stop.set()
        self._name = name = signal.Signals(number).name
        # os.write: print may be under way in the code that the signal interrupted.
        os.write(2, f"\n{name}: saving a checkpoint and stopping; Ctrl-C again ends at once\n".encode())
        with contextlib.suppress(OSError):
            self._run.append_event("signal", signal=name, node=self._node_rank)

    def _pass_on(self) -> None:
        self._stop.wait()
        while not self._done.is_set():
            for pid in processes.children(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            self._done.wait(RESEND_S)
