"""What a run prints: nothing that a terminal, a pipe or a file does with it stops or delays the run.

A reader that has gone (`launch … | head -1`), a terminal that was closed, a full disk under redirected output and a
terminal that stands still (Ctrl-S) all come to the same: lines are lost, and only lines. The run directory has
everything. Commands that answer a question (`launch ps`) print as any program does.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import signal
import sys
import threading
from typing import IO, TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_PIECES = 2000
"""Keep this many pieces of text, about a line each, for a slow reader; beyond that, lose the oldest."""
DRAIN_S = 2.0
"""Seconds that the end of a process waits for a slow reader."""

ERASE = b"\r\x1b[2K"
"""To the beginning of the terminal's line, which is emptied."""
ERASE_S = 0.5
"""Seconds, at most, that are waited for it."""
_is_drawn = False
"""Whether a line that was written in place is on the terminal."""
_place: Outlet | None = None
_outlets: list[Outlet] = []
_before: list[tuple[TextIO, TextIO]] = []
"""Standard output and error as they were."""


class Outlet(io.RawIOBase):
    """Accepts all text at once and never fails; a thread writes the text to a descriptor.

    Writing takes no lock, so a signal handler may do it. A forked process begins with an empty queue of its own.

    Args:
        descriptor: stays open; it need not have a reader.
    """

    name = "console"

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._begin()
        os.register_at_fork(after_in_child=self._begin)
        _outlets.append(self)

    def _begin(self) -> None:
        self._waiting: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._dropped = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The descriptor that the thread writes to."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether that is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        """Take all of ``data``."""
        global _is_drawn  # noqa: PLW0603
        if _is_drawn and self.isatty():
            _is_drawn = False
            data = ERASE + bytes(data)
        return self.take(data)

    def take(self, data: bytes | bytearray | memoryview) -> int:
        """The same, whatever stands in its way on the terminal."""
        if self._waiting.qsize() >= MAX_PIECES:
            with contextlib.suppress(queue.Empty):
                self._waiting.get_nowait()
                self._dropped += 1
        self._waiting.put(bytes(data))
        if self._thread is None:
            self._thread = threading.Thread(target=self._hand_on, args=(self._waiting,), name="console", daemon=True)
            self._thread.start()
        return len(data)

    def drain(self, timeout_s: float = DRAIN_S) -> bool:
        """Wait until all is written, for ``timeout_s`` at most; return whether it is."""
        if self._thread is None:
            return True
        done = threading.Event()
        self._waiting.put(done)
        return done.wait(timeout_s)

    def _hand_on(self, waiting: queue.SimpleQueue[bytes | threading.Event]) -> None:
        refused = told = 0
        while True:
            piece = waiting.get()
            if isinstance(piece, threading.Event):
                piece.set()
                continue
            lost = refused + self._dropped
            count = lost - told
            note = f"[{count} lines were not shown: nobody read them, or the disk was full]\n" if count else ""
            try:
                _write_all(self._descriptor, note.encode() + piece)
                told = lost
            except OSError:
                refused += 1


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:  # whoever shares the descriptor has set it to non-blocking
            select.select([], [descriptor], [])


def can_write_in_place(one: IO[str]) -> bool:
    """Whether a stream is a terminal, and one of ours, on which all others erase what stands in their way."""
    is_ours = isinstance(one, io.TextIOWrapper) and isinstance(one.buffer, Outlet)
    return is_ours and one.isatty() and os.environ.get("TERM") != "dumb"


def write_in_place(one: IO[str], text: str) -> None:
    """Show a line that the next text on the terminal replaces; :func:`can_write_in_place` says where that is possible.

    Args:
        one: a stream.
        text: narrower than the terminal.
    """
    global _is_drawn, _place  # noqa: PLW0603
    assert isinstance(one, io.TextIOWrapper)  # noqa: S101
    assert isinstance(one.buffer, Outlet)  # noqa: S101
    _place = one.buffer
    _place.take(ERASE + text.encode(one.encoding, "backslashreplace"))
    _is_drawn = True


def say_over(line: str, *, end: str = "\n") -> None:
    """Print a line over what another process may be showing in place on the same terminal."""
    begin = ERASE.decode() if can_write_in_place(sys.stdout) else ""
    print(f"{begin}{line}", end=end, flush=True)


def erase() -> None:
    """Remove what :func:`write_in_place` has shown."""
    global _is_drawn  # noqa: PLW0603
    if _is_drawn and _place:
        _is_drawn = False
        _place.take(ERASE)
        _place.drain(ERASE_S)  # what comes next may be written by another thread


def stream(descriptor: int, *, like: IO[str] | None = None) -> io.TextIOWrapper:
    """A text stream that never fails and never waits; ``like`` has its encoding."""
    encoding = getattr(like, "encoding", None) or "utf-8"
    outlet = Outlet(descriptor)
    return io.TextIOWrapper(outlet, encoding=encoding, errors="backslashreplace", line_buffering=True)


@contextlib.contextmanager
def opened(descriptor: int) -> Iterator[IO[str]]:
    """A stream as :func:`stream` makes it, which is written and closed with its descriptor afterwards."""
    made = stream(descriptor)
    assert isinstance(made.buffer, Outlet)  # noqa: S101
    try:
        yield made
    finally:
        drained = made.buffer.drain()
        _outlets.remove(made.buffer)
        if drained:  # else its thread still writes there, and the number must not become another file's
            os.close(descriptor)


def protect() -> None:
    """From here on what this process prints cannot stop or delay it, nor change its exit code.

    Streams that are no files, as in a notebook, stay as they are.
    """
    if is_protected():
        return
    try:
        descriptors = sys.stdout.fileno(), sys.stderr.fileno()
    except (OSError, AttributeError):
        return
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a background job may write to its terminal under `stty tostop` too
    flush_or_drop()
    _before.append((sys.stdout, sys.stderr))
    sys.stdout, sys.stderr = (stream(fd, like=one) for fd, one in zip(descriptors, _before[-1], strict=True))


def release() -> None:
    """Print as any program does from here on, for an answer that must not be lost."""
    if _before:
        drain()
        sys.stdout, sys.stderr = _before.pop()


def drain() -> None:
    """Wait a moment for what was printed to be written; before a process leaves by os._exit."""
    flush_or_drop()
    for outlet in _outlets:
        outlet.drain()


def flush_or_drop() -> OSError | None:
    """Write what the streams still hold; what nobody takes is dropped, so no later flush fails; return why."""
    problem = None
    for one in (sys.stdout, sys.stderr):
        try:
            one.flush()
        except OSError as error:
            problem = error
            with contextlib.suppress(OSError):
                _drop(one)
    return problem


def _drop(one: IO[str]) -> None:
    """Empty a stream into nowhere."""
    descriptor = one.fileno()
    kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    one.flush()
    os.dup2(kept, descriptor)
    os.close(nowhere)
    os.close(kept)


def redirect(log: Path) -> None:
    """Send standard output and error, C libraries' too, to a file from here on."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    flush_or_drop()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def open_missing() -> None:
    """Open standard streams that are closed (``>&-``), so that no file of this process takes their place."""
    for descriptor, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False))


def is_protected() -> bool:
    """Whether :func:`protect` was called."""
    return isinstance(sys.stdout, io.TextIOWrapper) and isinstance(sys.stdout.buffer, Outlet)


def is_refused(error: OSError) -> bool:
    """Whether an error came from writing to standard output or error: whether one more line meets the same."""
    for descriptor in (1, 2):
        try:
            if select.select([], [descriptor], [], 0)[1]:
                os.write(descriptor, b"\n")
        except OSError as again:
            if again.errno == error.errno:
                return True
    return False
