"""What a process is doing before its first line: nothing that takes longer than two seconds is silent.

On a terminal a line is written in place. Elsewhere a line tells of what takes longer, and of its time when it is done.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Self

from launcher.system import console

if TYPE_CHECKING:
    from collections.abc import Callable

TOLD_S = 2.0
"""What takes less than so many seconds is not told."""
SHOWN_S = 0.3
"""On a terminal it is shown after so many seconds."""
TICK_S = 0.2
_line: Line | None = None


class Line:
    """Tells of one phase after the other.

    Args:
        stream: where to.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._in_place = console.can_write_in_place(stream)
        self._phase = self._detail = ""
        self._since = 0.0
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing of it on the terminal, whatever happens."""
        self.end(told=False)

    def at(self, phase: str) -> None:
        """A phase begins, and the one before it ends; nothing where it is the same, or empty."""
        if phase == self._phase:
            return
        self.end()
        if phase:
            self._phase, self._since, self._over = phase, time.monotonic(), threading.Event()
            self._thread = threading.Thread(target=self._tell, args=(self._over,), name="phases", daemon=True)
            self._thread.start()

    def update(self, detail: str) -> None:
        """How far it has come."""
        self._detail = detail

    def end(self, *, told: bool = True) -> None:
        """The phase is over; no thread is left of it, so that this process may fork.

        Args:
            told: say how long it took, where it took long.
        """
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        took = time.monotonic() - self._since
        if self._in_place:
            console.erase()
        if told and took >= TOLD_S:
            print(f"{self._phase}: {took:.1f} s", file=self._stream, flush=True)
        self._phase, self._detail, self._thread = "", "", None

    def _tell(self, over: threading.Event) -> None:
        due = TOLD_S
        while not over.wait(TICK_S):
            took = time.monotonic() - self._since
            text = f"{self._phase} {self._detail}".rstrip()
            if self._in_place:
                if took >= SHOWN_S:
                    width = shutil.get_terminal_size().columns - 1
                    console.write_in_place(self._stream, f"{text} … {took:.0f} s"[:width])
            elif took >= due:
                due *= 2
                print(f"{text} … {took:.0f} s", file=self._stream, flush=True)


def show() -> None:
    """From here on, tell what this process is doing, on standard error, where that can delay nothing."""
    global _line  # noqa: PLW0603  a process has one terminal
    if _line is None and console.is_protected():
        _line = Line(sys.stderr)
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    global _line  # noqa: PLW0603
    _line = None


def at(phase: str) -> None:
    """What this process is about to do, if that is told."""
    if _line:
        _line.at(phase)


def counting(phase: str) -> Callable[[int, int], None]:
    """A phase begins that gets on by numbers; returns what takes how many are done, of how many."""
    at(phase)

    def update(done: int, total: int) -> None:
        if _line:
            _line.update(f"{done:,} of {total:,}")

    return update


def end() -> None:
    """Nothing of the kind is being done any more."""
    if _line:
        _line.end()


def stop() -> None:
    """From here on, tell nothing."""
    if _line:
        _line.end(told=False)
    _forget()
