"""Gives the files of an export their names in exports/; what was made before stays whole until then.

What is to be moved and removed is written down first, so that the next who looks finishes what a kill or an
exception interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.system import processes
from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.runs.run_dir import RunDir

    Json = dict[str, Any]

PREFIX = ".export-"
"""Of folders in exports/ where files are made: HOST-PROCESS.STARTED-WORD follows. Containers with one host name have
processes of the same number, so when the process started is said as well."""
PLAN = "publish.json"
"""In such a folder, beside the new manifest, once all of its files are made and chosen: ``{own, removed}``."""
SAME_TEMPERATURE = 1e-3
"""Relative: the same images give the same up to rounding, which differs between machines."""
OLD_S = 24 * 3600
"""A folder of another machine, whose processes cannot be looked at, is abandoned where nothing changed for so long."""


@contextlib.contextmanager
def workplace(run: RunDir) -> Iterator[Path]:
    """The folder where this process makes files.

    It is removed at the end, but where an exception interrupts the giving of names: what is made stays for the next
    who looks.
    """
    process = os.getpid()
    owner = f"{socket.gethostname()}-{process}.{processes.start_time(process)}"
    folder = Path(tempfile.mkdtemp(dir=run.exports, prefix=f"{PREFIX}{owner}-"))
    try:
        yield folder
    finally:
        if not (folder / PLAN).exists():
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(run: RunDir) -> None:
    """Finish what exports that were killed had begun to publish, and remove what they left; others may be under way."""
    with _alone(run.exports):
        _finish_abandoned(run)
    for left in run.exports.glob(f"{PREFIX}*"):
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def read_manifest(run: RunDir) -> Json | None:
    """What the run's exports are, as the manifest says; None: it has none that can be read."""
    if any(run.exports.glob(f"{PREFIX}*/{PLAN}")):
        with contextlib.suppress(OSError), _alone(run.exports):  # somebody else's run may not be written
            _finish_abandoned(run)
    try:
        found = json.loads(run.export_manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def calibration_of(run: RunDir, step: int) -> Json | None:
    """What the exports of the checkpoint of a step were calibrated to; None: they were not, or there are none."""
    manifest = read_manifest(run)
    if manifest is None or manifest["checkpoint"]["step"] != step:
        return None
    found: Json | None = manifest.get("calibration")
    return found


def temperature_of(calibration: Json | None) -> float:
    """What logits are divided by before they become probabilities."""
    return float((calibration or {}).get("temperature", 1.0))


def _finish_abandoned(run: RunDir) -> None:
    for plan in run.exports.glob(f"{PREFIX}*/{PLAN}"):
        if _is_abandoned(plan.parent):
            _carry_out(run, plan)


def _carry_out(run: RunDir, plan: Path) -> None:
    """Move and remove as the plan says, the manifest last. It may have been done in part; it takes no space on disk."""
    content = json.loads(plan.read_text(encoding="utf-8"))
    for name in content["removed"]:
        for file in (run.exports / name, run.exports / f"{name}.data"):
            file.unlink(missing_ok=True)
    for file in plan.parent.iterdir():
        if file.name.removesuffix(".data") in content["own"]:
            file.replace(run.exports / file.name)
    manifest = plan.with_name(run.export_manifest.name)
    if manifest.exists():
        manifest.replace(run.export_manifest)
    plan.unlink()


def _is_abandoned(folder: Path) -> bool:
    host, process, *_ = [*folder.name.removeprefix(PREFIX).rsplit("-", 2), ""]  # a host's name may have dashes
    process, _, started = process.partition(".")  # earlier versions did not say when
    if host == socket.gethostname() and process.isdigit():
        return not _lives(int(process), started)
    try:
        return time.time() - folder.stat().st_mtime > OLD_S
    except OSError:  # it is gone
        return False


def _lives(process: int, started: str) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    now = processes.start_time(process)
    return not started or now is None or now == started  # None: it cannot be seen


def checkpoint_of(state: Json) -> Json:
    """What the manifest says of the checkpoint, by its ``state.json``."""
    found = state["early_stopping"]["best"]
    if found and found["step"] == state["step"]:
        return {"epoch": found["epoch"], **{key: found[key] for key in ("step", "metric", "value")}}
    return {"epoch": state.get("epoch"), "step": state["step"], "metric": None, "value": None}


def publish(run: RunDir, made: Path, manifest: Json, known: Sequence[str]) -> list[str]:
    """Move this export's accepted files, and those that nothing could be measured of, from the folder to exports/.

    Rows of an earlier export of the same checkpoint stay, with their files, where this one judged nothing under their
    name; every other file of ours is removed, so that each file in exports/ is of the checkpoint and of the row that
    the manifest names. What was accepted does not give way to what could not be measured.

    Args:
        run: the run directory.
        made: the folder. It may hold files without a row, or refused ones.
        manifest: of the new files; it is completed and written.
        known: names that exports give to files.

    Returns:
        Files that were removed for their temperature.
    """
    with _alone(run.exports):
        _finish_abandoned(run)
        earlier, calibration = _earlier(run, manifest)
        if manifest["not_measured"] is not None:
            better = {row["file"] for row in earlier if row["accepted"]}
            manifest["exports"] = [row for row in manifest["exports"] if row["file"] not in better]
        own = {row["file"] for row in manifest["exports"] if row["accepted"] or row["agreement"] is None}
        others = earlier if own and _differs(calibration, manifest["calibration"]) else []
        tried = [*manifest["exports"], *manifest.get("ladder", ())]
        judged = {row["file"] for row in tried if row["agreement"] is not None}
        kept = [row for row in earlier if row not in others and row["file"] not in own | judged]
        manifest["exports"] += kept
        if kept and (not own or manifest["calibration"] is None):  # theirs is in their metadata
            manifest["calibration"] = calibration
        has_row = {row["file"] for row in kept}
        manifest["not_made"] = [row for row in manifest["not_made"] if row["file"] not in has_row]
        write_json_atomic(made / run.export_manifest.name, manifest, durable=True)
        plan = {"own": sorted(own), "removed": sorted({*known} - own - has_row)}
        write_json_atomic(made / PLAN, plan, durable=True)
        _carry_out(run, made / PLAN)
        return [row["file"] for row in others if row["file"] not in own | judged]


def _differs(earlier: Json | None, new: Json | None) -> bool:
    """Whether files have another temperature than the new ones, of which None says nothing."""
    pair = temperature_of(earlier), temperature_of(new)
    return new is not None and not math.isclose(*pair, rel_tol=SAME_TEMPERATURE)


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


def may_be_replaced(target: Path, facts: str, made_by: str) -> bool:
    """Whether a folder is empty, or one that the same command made: its ``facts`` say so."""
    if not target.is_dir():
        return False
    try:
        return bool(json.loads((target / facts).read_text(encoding="utf-8")).get("made_by") == made_by)
    except (OSError, ValueError, AttributeError):
        return not any(target.iterdir())
