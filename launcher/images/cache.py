"""Remembers what earlier scans found about image files, so that only new and changed files are read.

One file for each data folder, ``scans/HASH.jsonl`` in the cache directory: a line that says what it is, then one line
for each image. It is replaced as a whole: of two scans at the same time, the one that ends later stays.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import secrets
from typing import TYPE_CHECKING

from launcher.images import folder as image_folder

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.images.probe import Answer

VERSION = 2

Stamp = tuple[int, int]
"""Size in bytes, and time of the last change in nanoseconds: an answer counts while the file still has both."""
Entries = dict[str, tuple[Stamp, "Answer"]]
"""By path, relative to the data folder."""


def file_of(folder: Path) -> Path:
    """Where the answers about a data folder are kept."""
    name = hashlib.blake2b(str(folder.absolute()).encode(errors="surrogateescape"), digest_size=12).hexdigest()
    return image_folder.cache_dir() / "scans" / f"{name}.jsonl"


def load(folder: Path) -> Entries:
    """The answers about a data folder; empty if the file is missing, damaged or of another version."""
    entries: Entries = {}
    collects = gc.isenabled()
    gc.disable()  # it would scan up to a million entries again and again while they are read
    try:
        with contextlib.suppress(OSError, ValueError), file_of(folder).open(encoding="ascii") as lines:
            if json.loads(next(lines, "null")) != _header(folder):
                return {}
            for line in lines:
                path, size, mtime_ns, digest, kind, message, notes, levels = json.loads(line)
                entries[path] = (size, mtime_ns), (digest, kind, message, tuple(notes), levels and tuple(levels))
    finally:
        if collects:
            gc.enable()
    return entries


def save(folder: Path, entries: Entries) -> None:
    """Replace the answers about a data folder.

    Raises:
        OSError: the cache directory cannot be written.
    """
    file = file_of(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")  # several machines may share the folder
    try:
        with beside.open("w", encoding="ascii") as lines:
            lines.write(json.dumps(_header(folder)) + "\n")
            for path, (stamp, answer) in entries.items():
                lines.write(json.dumps([path, *stamp, *answer]) + "\n")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _header(folder: Path) -> dict[str, str | int]:
    """The first line. Answers of another Pillow do not count: it may decode what this one refuses."""
    return {"version": VERSION, "pillow": importlib.metadata.version("pillow"), "folder": str(folder.absolute())}
