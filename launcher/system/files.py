"""How files are written so that a reader never sees half of one: whole files by renaming, records line by line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROBE_BYTES = 1 << 16
"""More than a file system keeps beside a file's name, which a full disk may still take."""


def write_text_atomic(path: Path, text: str, *, durable: bool = False) -> None:
    """Write ``text`` beside ``path`` and rename it there: a reader sees the old file or the new one, whole.

    Args:
        path: the file.
        text: its new content.
        durable: whether the file must survive a loss of power right after.
    """
    # Not by its process alone: other threads may write the same file, and containers on other nodes have the same ids.
    beside = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        if durable:
            fsync(beside)
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def write_json_atomic(path: Path, value: Any, *, durable: bool = False) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n", durable=durable)


def check_room(folder: Path, name: str = ".probe") -> None:
    """Write and remove some bytes.

    Args:
        folder: where.
        name: of the file; of its own where several processes look at once.

    Raises:
        OSError: the disk or quota is full, or the folder cannot be written.
    """
    probe = folder / name
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Have the disk write a file's content, or the names in a folder, so that they survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one line in one ``write`` and under a lock, so that lines of several processes or nodes never mix."""
    line = json.dumps(record, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(
            OSError
        ):  # for NFS, which may append at an old end (open(2)); some file systems have no locks
            fcntl.lockf(descriptor, fcntl.LOCK_EX)  # closing the file frees it
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # the last writer was killed in the middle of a line
            line = "\n" + line
        encoded = line.encode()
        if os.write(descriptor, encoded) != len(encoded):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a ``.jsonl`` file; lines cut by a crash or a loss of power yield none.

    What is left of a line may be JSON by itself, such as a number or a text.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            yield record
