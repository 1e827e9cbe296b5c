"""Gives the files of an export their names in exports/, all at once; what was made before stays whole until then."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from typing import TYPE_CHECKING, Any

from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from launcher.runs.run_dir import RunDir

    Json = dict[str, Any]

PREFIX = ".export-"
"""Of folders in exports/ where files are made: the machine's name, the process's number and a random word follow."""
OLD_S = 24 * 3600
"""A folder of another machine, whose processes cannot be looked at, is abandoned where nothing changed for so long."""


def prefix() -> str:
    """Of the folder where this process makes files."""
    return f"{PREFIX}{socket.gethostname()}-{os.getpid()}-"


def remove_abandoned(exports: Path) -> None:
    """Remove what exports that were killed have left; others may be under way."""
    for left in exports.glob(f"{PREFIX}*"):
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    host, process, *_ = [*folder.name.removeprefix(PREFIX).rsplit("-", 2), ""]  # a host's name may have dashes
    if host == socket.gethostname() and process.isdigit():
        return not _lives(int(process))
    try:
        return time.time() - folder.stat().st_mtime > OLD_S
    except OSError:  # it is gone
        return False


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
    """Move this export's accepted files, and those that nothing could be measured of, from the folder to exports/.

    Rows of an earlier export of the same checkpoint stay, with their files, where this one judged nothing under their
    name; every other file of ours is removed, so that each file in exports/ is of the checkpoint and of the row that
    the manifest names. What was accepted does not give way to what could not be measured.

    Args:
        run: the run directory.
        made: the folder. It may hold files without a row, or refused ones.
        manifest: of the new files; it is completed and written.
        known: names that exports give to files.
    """
    with _alone(run.exports):
        earlier, calibration = _earlier(run, manifest)
        if manifest["not_measured"] is not None:
            better = {row["file"] for row in earlier if row["accepted"]}
            manifest["exports"] = [row for row in manifest["exports"] if row["file"] not in better]
        own = {row["file"] for row in manifest["exports"] if row["accepted"] or row["agreement"] is None}
        tried = [*manifest["exports"], *manifest.get("ladder", ())]
        judged = {row["file"] for row in tried if row["agreement"] is not None}
        kept = [row for row in earlier if row["file"] not in own | judged]
        manifest["exports"] += kept
        if kept and manifest.get("calibration") is None:  # theirs is in their metadata, and of the same checkpoint
            manifest["calibration"] = calibration
        has_row = {row["file"] for row in kept}
        manifest["not_made"] = [row for row in manifest["not_made"] if row["file"] not in has_row]
        for name in known:
            if name not in own | has_row:
                for file in (run.exports / name, run.exports / f"{name}.data"):
                    file.unlink(missing_ok=True)
        for file in made.iterdir():
            if file.name.removesuffix(".data") in own:
                file.replace(run.exports / file.name)
        write_json_atomic(run.export_manifest, manifest)


def _earlier(run: RunDir, manifest: Json) -> tuple[list[Json], Json | None]:
    """Of the last manifest, if it was of the same checkpoint: rows of files that are there, and its calibration.

    A row that was refused is not among them.
    """
    try:
        before = json.loads(run.export_manifest.read_text(encoding="utf-8"))
        if before["checkpoint"] != manifest["checkpoint"]:
            return [], None
        rows = [row for row in before["exports"] if row["accepted"] or row["agreement"] is None]
        return [row for row in rows if (run.exports / row["file"]).is_file()], before.get("calibration")
    except (OSError, ValueError, KeyError, TypeError):
        return [], None


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
