"""The one way to wait for something: look again and again, heed a stop meanwhile, and say what is awaited."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POLL_S = 0.2
FIRST_S, EVERY_S = 2.0, 30.0
"""After this long a line says what is awaited, and again each time that the second has passed."""


def wait_until(
    is_there: Callable[[], object],
    *,
    timeout_s: float | None,
    heed: Callable[[], object],
    what: str | Callable[[], str] = "",
    cure: str = "",
    every_s: float = POLL_S,
) -> bool:
    """Wait until ``is_there`` says so.

    Args:
        is_there: asked again and again.
        timeout_s: give up then; None: never.
        heed: called each time; what it raises ends the wait.
        what: is awaited, for a line now and then; empty: nothing is said. A function where it changes.
        cure: what a user can do to end the wait; ends that line.
        every_s: how often ``is_there`` is asked.

    Returns:
        False where it was given up.
    """
    start, notice = time.monotonic(), Notice()
    while not is_there():
        heed()
        if timeout_s is not None and time.monotonic() - start > timeout_s:
            return False
        notice.say(what() if callable(what) else what, cure)
        time.sleep(every_s)
    return True


def is_listed(path: Path) -> bool:
    """Whether a file or folder is there, by a new listing of its folder.

    A shared file system may say for a minute that it is not (NFS keeps what it has found absent).
    """
    try:
        return path.name in os.listdir(path.parent)  # noqa: PTH208
    except FileNotFoundError:
        return path.parent != path and is_listed(path.parent) and path.exists()


class Notice:
    """Says what is awaited, and since when, every now and then; silent while that is an empty text."""

    def __init__(self) -> None:
        self._what = ""
        self._since = ""
        self._next = 0.0

    def say(self, what: str, cure: str = "") -> None:
        """What is awaited now, and what a user can do to end the wait."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._since, self._next = what, time.strftime("%H:%M:%S"), now + FIRST_S
        elif what and now >= self._next:
            self._next = now + EVERY_S
            line = f"waiting for {what} since {self._since}" + (f"; {cure}" if cure else "")
            print(line, file=sys.stderr, flush=True)
