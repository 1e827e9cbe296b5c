"""Follows a file of JSON lines as it grows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READ_BYTES = 1 << 20
"""Bytes that are read at once: a long run's files are read in pieces."""


class Lines:
    """The whole lines of a file of JSON lines that were not seen yet.

    Args:
        path: of the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def new(self, *, final: bool = False) -> Iterator[dict[str, Any]]:
        """What came since the last time; a line that is still written comes when it is whole.

        Args:
            final: whether nobody writes any more, so that a last line without an end counts where it is JSON.
        """
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:  # replaced
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                while piece := file.read(READ_BYTES):
                    self._offset += len(piece)
                    *lines, self._rest = (self._rest + piece).split(b"\n")
                    yield from (value for value in map(_parsed, lines) if value is not None)
        except FileNotFoundError:
            return
        if final and (value := _parsed(self._rest)) is not None:
            self._rest = b""
            yield value


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line as JSON; None: it is empty, or half of one (a machine has died while it was written)."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
