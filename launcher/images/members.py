"""Images that lie in tar archives, each known by a path that says where its bytes are, and read from there.

``FOLDER/train-000000.tar/512+13456/0001.jpg``: 13,456 bytes of that archive, from byte 512 on, called 0001.jpg in it.
Whoever has such a path can read it, in any order and in any process: nothing else has to be known or kept open.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import posixpath
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
"""Bytes of a member's header, which lie right before its content."""
MOST_OPEN = 64
"""Archives that a process keeps open."""
_MEMBER = re.compile(r"(.*\.(?i:tar))/(\d+)\+(\d+)/(.+)", re.DOTALL)


class Member(NamedTuple):
    """A file in an archive."""

    archive: str
    """Its path."""
    start: int
    """The byte of the archive at which its content begins."""
    size: int
    """Bytes of the content."""
    name: str
    """As the archive has it."""

    @property
    def path(self) -> str:
        """What it is known by."""
        return f"{self.archive}/{self.start}+{self.size}/{inside(self.name)}"


def find(path: str) -> Member | None:
    """The member that a path means; None: it means a file."""
    found = _MEMBER.fullmatch(path) if ".tar/" in path.lower() else None
    return Member(found[1], int(found[2]), int(found[3]), found[4]) if found else None


def read(path: str) -> bytes:
    """The content of a file, or of a member of an archive.

    Raises:
        OSError: it cannot be read; or the archive has changed since the path was made.
    """
    member = find(path)
    if member is None:
        return Path(path).read_bytes()
    archive = _open(member.archive)  # held while it is read: another thread may open others
    content = _pread(archive.descriptor, BLOCK + member.size, member.start - BLOCK)
    if len(content) < BLOCK + member.size or not _is_header_of(content[:BLOCK], member):
        raise OSError(errno.ESTALE, "its archive has changed since it was indexed; start or resume again", path)
    return content[BLOCK:]


def stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds: of a member its own size, and its archive's time.

    Raises:
        OSError: it is not there.
    """
    member = find(path)
    found = os.stat(member.archive if member else path)  # noqa: PTH116  a million times
    return member.size if member else found.st_size, found.st_mtime_ns


def exists(path: str) -> bool:
    """Whether a file, or the archive of a member, is there."""
    member = find(path)
    return os.path.isfile(member.archive if member else path)  # noqa: PTH113  a million times


def stream(path: str) -> str | io.BytesIO:
    """What Pillow can open: the path of a file as it is, of which it may read the header alone; or a member's content.

    Raises:
        OSError: the member cannot be read.
    """
    return io.BytesIO(read(path)) if find(path) else path


class _Archive:
    """An open archive; closed when nobody has it any more, so not while a thread still reads."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it could not be opened
            os.close(self.descriptor)


@functools.lru_cache(maxsize=MOST_OPEN)
def _open(path: str) -> _Archive:
    return _Archive(path)


def _pread(descriptor: int, size: int, start: int) -> bytes:
    """All of it: the kernel gives at most 2 GiB at once, and over a network less."""
    parts, left = [], size
    while left and (part := os.pread(descriptor, left, start + size - left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _is_header_of(header: bytes, member: Member) -> bool:
    """Whether a member of this size, and of this name where the header has all of it, lies there."""
    try:
        found = tarfile.TarInfo.frombuf(header, "ascii", "replace")
    except tarfile.TarError:
        return False
    whole = len(member.name) < tarfile.LENGTH_NAME and member.name.isascii() and "?" not in found.name
    return found.size == member.size and (not whole or inside(found.name) == member.name)


def inside(name: str) -> str:
    """A member's name as part of a path that leads out of nothing."""
    return posixpath.normpath(f"/{name}").lstrip("/")
