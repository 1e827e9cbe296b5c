"""Gives the files of an export their names in exports/, all at once; what was made before stays whole until then."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from typing import TYPE_CHECKING, Any

from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from launcher.runs.run_dir import RunDir

    Json = dict[str, Any]

PREFIX = f".export-{socket.gethostname()}-"
"""Of folders in exports/ where this machine's processes make files; their number follows."""


def prefix() -> str:
    """Of the folder where this process makes files."""
    return f"{PREFIX}{os.getpid()}-"


def remove_abandoned(exports: Path) -> None:
    """Remove what exports that were killed on this machine have left; others may be under way."""
    for left in exports.glob(f"{PREFIX}*"):
        process = left.name.removeprefix(PREFIX).partition("-")[0]
        if not process.isdigit() or not _lives(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def checkpoint_of(state: Json) -> Json:
    """What the manifest says of the checkpoint, by its ``state.json``."""
    found = state["early_stopping"]["best"]
    if found and found["step"] == state["step"]:
        return {"epoch": found["epoch"], **{key: found[key] for key in ("step", "metric", "value")}}
    return {"epoch": state.get("epoch"), "step": state["step"], "metric": None, "value": None}


def publish(run: RunDir, made: Path, manifest: Json, known: Sequence[str]) -> None:
    """Move accepted files, and those that nothing could be measured of, from the folder to exports/.

    Rows of an earlier export of the same checkpoint stay where nothing new was made under their name; every other file
    of ours is removed, so that each file in exports/ is of the checkpoint that the manifest names.

    Args:
        run: the run directory.
        made: the folder.
        manifest: of the new files; it is completed and written.
        known: names that exports give to files.
    """
    with _alone(run.exports):
        tried = {row["file"] for row in manifest["exports"]}
        kept = [row for row in _earlier(run, manifest) if row["file"] not in tried]
        manifest["exports"] += kept
        has_row = {row["file"] for row in kept}
        manifest["not_made"] = [row for row in manifest["not_made"] if row["file"] not in has_row]
        is_measured = manifest["not_measured"] is None
        published = {row["file"] for row in manifest["exports"] if row["accepted"] or not is_measured}
        for name in known:
            if name not in published:
                for file in (run.exports / name, run.exports / f"{name}.data"):
                    file.unlink(missing_ok=True)
        for file in made.iterdir():
            if file.name.removesuffix(".data") in published:
                file.replace(run.exports / file.name)
        write_json_atomic(run.export_manifest, manifest)


def _earlier(run: RunDir, manifest: Json) -> list[Json]:
    """Rows of the last manifest whose files are there, if it was of the same checkpoint."""
    try:
        before = json.loads(run.export_manifest.read_text(encoding="utf-8"))
        is_same = before["checkpoint"] == manifest["checkpoint"]
        return [row for row in before["exports"] if is_same and (run.exports / row["file"]).is_file()]
    except (OSError, ValueError, KeyError, TypeError):
        return []


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other export of the run gives names meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # closing it frees it
        yield
    finally:
        os.close(descriptor)
