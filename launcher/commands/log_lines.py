"""The lines of one rank's log, read piece by piece while it may still be written (``launch logs``)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

LINE_BYTES = 64 * 1024
"""A longer line is cut into lines of this length, at whole UTF-8 characters."""
TURN_BYTES = 1024 * 1024
"""How much one rank may say before the next one's turn, while following."""

_CONTINUES = range(0x80, 0xC0)  # bytes of a UTF-8 character after its first
_MARK_BYTES = 32


@dataclass(slots=True)
class RankLog:
    """How far one rank's log was printed: neither its text nor an open file, there may be thousands."""

    offset: int = 0
    """Where the first line begins that was not printed yet."""
    tail: int | None = None
    """So many lines before ``offset`` are to be printed too; None when they were looked for."""
    mark: bytes = b""
    """What stands right before ``offset``, to know the file again by."""
    inode: int | None = None
    size: int = 0
    seen: tuple[int, int, int] | None = None
    """Inode, size and time of the last change, as last listed."""
    backlog: bool = False
    """Whether there is more than a turn's worth to print."""

    def new_lines(self, file: BinaryIO, *, at_end: bool) -> Iterator[bytes]:
        """Yield the lines that were appended, at most ``TURN_BYTES``; an unfinished one only ``at_end``."""
        stat = os.fstat(file.fileno())
        if self.inode not in (None, stat.st_ino) or stat.st_size < self.size or not self._is_marked(file):
            self.offset, self.tail, self.mark = 0, None, b""
        self.inode, self.size, self.backlog = stat.st_ino, stat.st_size, False
        if self.tail is not None:
            self.offset, self.tail = _line_start(file, self.offset, self.tail), None
        file.seek(self.offset)
        for line, is_whole in read_lines(file, min(stat.st_size, self.offset + TURN_BYTES)):
            if not is_whole and not at_end:
                return
            self.offset += len(line)
            self.mark = (self.mark + line)[-_MARK_BYTES:]
            yield line
        self.backlog = self.offset < stat.st_size

    def _is_marked(self, file: BinaryIO) -> bool:
        """Whether the file still has what was printed of it: a replaced one may get the old one's inode."""
        file.seek(self.offset - len(self.mark))
        return file.read(len(self.mark)) == self.mark


def read_lines(file: BinaryIO, end: int) -> Iterator[tuple[bytes, bool]]:
    """Yield the lines that begin before ``end``, from where ``file`` stands.

    Yields:
        At most ``LINE_BYTES`` and a newline; and whether it is whole: ended by a newline, or cut because it is long.
    """
    position, rest = file.tell(), b""
    while position < end:
        line = rest + file.readline(LINE_BYTES + 1 - len(rest))
        is_whole, rest = line.endswith(b"\n"), b""
        if not is_whole and len(line) > LINE_BYTES:
            cut = _character_start(line, LINE_BYTES)
            line, rest, is_whole = line[:cut], line[cut:], True
        if line:
            yield line, is_whole
        if not is_whole:
            return
        position += len(line)


def _line_start(file: BinaryIO, end: int, num_lines: int) -> int:
    """Where the ``num_lines`` lines before ``end`` begin, or for 0 the unfinished one; inside of one if it is long."""
    begin = max(0, end - max(num_lines, 1) * LINE_BYTES)
    file.seek(begin)
    text = file.read(end - begin)
    position = len(text) - (num_lines > 0 and text.endswith(b"\n"))
    for _ in range(max(num_lines, 1)):
        position = text.rfind(b"\n", 0, position)
        if position < 0:
            return begin + _character_start(text, 3) if begin else 0
    return begin + position + 1


def _character_start(text: bytes, position: int) -> int:
    """The last ``position`` up to this one at which a UTF-8 character begins."""
    return next((p for p in range(position, position - 3, -1) if text[p] not in _CONTINUES), position - 3)
