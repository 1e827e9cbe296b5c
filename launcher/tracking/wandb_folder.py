"""wandb's folder of a run: whether it can be written, which records the server lacks, and how to send them."""

from __future__ import annotations

import json
import shlex
import time
from typing import TYPE_CHECKING, Any

from launcher.system.files import check_room

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from launcher.runs.run_dir import RunDir

UNSYNCED = "wandb_unsynced"
"""Kind of the event for a record (``folder``) that was not sent completely, and why (``reason``)."""


def unsynced(run: RunDir, events: Iterable[dict[str, Any]]) -> list[Path]:
    """The folders of records that the server lacks, oldest first.

    These are offline ones, and online ones that the run's ``events`` say were given up, without the mark that
    ``wandb sync`` leaves.
    """
    given_up = {run.wandb / str(event["folder"]) for event in events if event.get("kind") == UNSYNCED}
    return sorted(
        (
            folder
            for folder in {*run.wandb.glob("offline-run-*"), *given_up}
            if any(folder.glob("run-*.wandb")) and not is_synced(folder)
        ),
        key=lambda folder: folder.name.removeprefix("offline-"),
    )


def is_synced(folder: Path) -> bool:
    """Whether a record has the mark that ``wandb sync`` leaves."""
    return any(folder.glob("*.wandb.synced"))


def mark_synced(run: RunDir) -> None:
    """Leave that mark on all records of a run: the server has what they hold."""
    for folder in (*run.wandb.glob("offline-run-*"), *run.wandb.glob("run-*")):
        for file in folder.glob("run-*.wandb"):
            file.with_name(f"{file.name}.synced").touch()


def newest_online(run: RunDir) -> Path | None:
    """The record that was begun last of those that were to be sent at once."""
    return max((folder for folder in run.wandb.glob("run-*") if folder.is_dir()), default=None)


def await_new_name(folder: Path) -> None:
    """Wandb names a record by the second; in one that has a record already, wait for the next."""
    while any(folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-*")):
        time.sleep(0.1)


def sync_command(folders: Iterable[Path]) -> str:
    """The command that sends these records; without --include-online wandb skips those that were begun online."""
    names = [str(folder) for folder in folders]
    online = any("/offline-run-" not in name for name in names)
    return shlex.join(["wandb", "sync", *(["--include-online"] if online else []), *names])


def check_writable(folder: Path) -> None:
    """Write and remove some bytes. wandb itself says nothing when its disk is full.

    Raises:
        OSError: the disk or quota is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder)


def upload_error(folder: Path) -> str | None:
    """Why wandb stopped sending a record for good, by its own log; its ``finish`` returns as if all had been sent."""
    try:
        lines = (folder / "logs" / "debug-internal.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if "filestream: fatal error" in line:
            try:
                return str(json.loads(line)["msg"])
            except (ValueError, KeyError, TypeError):
                return line
    return None
