"""What a process is doing now: nothing that takes longer than two seconds is silent.

On a terminal a line is written in place. Elsewhere a line tells of what takes longer, and of its time when it is done.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Protocol

from launcher.system import console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOLD_S = 2.0
"""What takes less than so many seconds is not told."""
SHOWN_S = 0.3
"""On a terminal it is shown after so many seconds."""
TICK_S = 0.2
_teller: Teller | None = None


class Teller(Protocol):
    """Who tells a person of phases: a line, or a progress bar that is there already."""

    phase: str
    """What is being done; empty: nothing that is told."""

    def at(self, phase: str) -> None:
        """A phase begins, and the one before it ends; nothing where it is the same, or empty."""

    def update(self, detail: str) -> None:
        """How far it has come."""

    def end(self, *, told: bool = True) -> None:
        """The phase is over."""


class Line:
    """Tells of one phase after the other.

    Args:
        stream: where to.
        told_s: the time of a phase that takes less than so many seconds is not told; None: TOLD_S.
    """

    def __init__(self, stream: IO[str], *, told_s: float | None = None) -> None:
        self._stream = stream
        self._told_s = told_s
        self._in_place = console.can_write_in_place(stream)
        self.phase = ""
        """What is being done; empty: nothing that is told."""
        self._detail = ""
        self._since = 0.0
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def at(self, phase: str) -> None:
        """A phase begins, and the one before it ends; nothing where it is the same, or empty."""
        if phase == self.phase:
            return
        self.end()
        if phase:
            self.phase, self._since, self._over = phase, time.monotonic(), threading.Event()
            self._thread = threading.Thread(target=self._tell, args=(self._over,), name="phases", daemon=True)
            self._thread.start()

    def update(self, detail: str) -> None:
        """How far it has come."""
        if self._thread:
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
        if told and took >= (TOLD_S if self._told_s is None else self._told_s):
            print(f"{self.phase}: {took:.1f} s", file=self._stream, flush=True)
        self.phase, self._detail, self._thread = "", "", None

    def _tell(self, over: threading.Event) -> None:
        due = TOLD_S
        while not over.wait(TICK_S):
            took = time.monotonic() - self._since
            text = f"{self.phase} {self._detail}".rstrip()
            if self._in_place:
                if took >= SHOWN_S:
                    width = shutil.get_terminal_size().columns - 1
                    console.write_in_place(self._stream, f"{text} … {took:.0f} s"[:width])
            elif took >= due:
                due *= 2
                print(f"{text} … {took:.0f} s", file=self._stream, flush=True)


def show() -> None:
    """From here on, tell what this process is doing, on standard error, where that can delay nothing."""
    global _teller  # noqa: PLW0603  a process has one terminal
    if _teller is None and console.is_protected():
        _teller = Line(sys.stderr)


@contextlib.contextmanager
def before_answer() -> Iterator[None]:
    """Tell what this process is doing while it finds the answer that it prints afterwards."""
    console.protect()
    show()
    try:
        yield
    finally:
        stop()
        console.release()


@contextlib.contextmanager
def told_by(teller: Teller) -> Iterator[None]:
    """For a while, have another one tell what this process is doing; it leaves nothing of it on the terminal."""
    global _teller  # noqa: PLW0603
    before, _teller = _teller, teller
    try:
        yield
    finally:
        teller.end(told=False)
        _teller = before


def _forget() -> None:
    global _teller  # noqa: PLW0603
    _teller = None


os.register_at_fork(after_in_child=_forget)


def at(phase: str) -> None:
    """What this process is about to do, if that is told."""
    if _teller:
        _teller.at(phase)


def update(detail: str) -> None:
    """How far the phase has come, if that is told."""
    if _teller:
        _teller.update(detail)


def counting(phase: str) -> Callable[[int, int], None]:
    """A phase begins that gets on by numbers; returns what takes how many are done, of how many."""
    at(phase)
    return lambda done, total: update(f"{done:,} of {total:,}")


@contextlib.contextmanager
def during(phase: str) -> Iterator[Callable[[int, int], None]]:
    """The same for what is done in the block, however that ends; what was done before it goes on then."""
    before = _teller.phase if _teller else ""
    try:
        yield counting(phase)
    finally:
        end()
        at(before)


def end() -> None:
    """Nothing of the kind is being done any more."""
    if _teller:
        _teller.end()


def stop() -> None:
    """From here on, tell nothing."""
    if _teller:
        _teller.end(told=False)
    _forget()
