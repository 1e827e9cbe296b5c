"""Submits a script with sbatch and finds the job's id, whatever sbatch prints."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends.slurm import client as slurm_client
from launcher.backends.slurm.client import SlurmError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

LOST = ("no answer", "timed out", "contact", "onnect", "Zero Bytes", "Unexpected message", "names no job")
"""Parts of error messages after which the job may exist all the same, perhaps a little later."""
ASKS, PAUSE_S = 6, 5.0
"""So often, and so far apart, the queue is asked for such a job."""
_ID = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S*| on cluster \S+)?")
_WIDTHS = {"ArrayJobID": 20, "Name": 300, "StdOut": 4096}
"""Fields of squeue and their widths, in bytes."""


def submit(script: Path, *options: str, name: str, logs: Path, known: Collection[str] = ()) -> str:
    """Submit a script; return the id of its job.

    A job that is there though sbatch failed, or gave no answer in time, is taken for what it is: the queue is asked.

    Args:
        script: the file.
        options: of sbatch.
        name: of the job.
        logs: the folder that its output goes to, which no other run's does.
        known: ids of earlier jobs of the same name and folder.

    Raises:
        SlurmError: there is no job, or SLURM does not say whether there is.
    """
    try:
        job_id = _id_in(slurm_client.run("sbatch", "--parsable", *options, str(script)))
    except SlurmError as error:
        is_lost = any(word in str(error) for word in LOST)
        found = _ask(name, logs, known, error, num=ASKS if is_lost else 1)
        if found is None:
            raise
        print(f"warning: {error}\nyet job {found} is in the queue: taken", file=sys.stderr, flush=True)
        return found
    except KeyboardInterrupt:
        with contextlib.suppress(SlurmError):
            take_back([queued for queued in _queued(name, logs) if queued not in known])
        raise
    return job_id


def take_back(job_ids: Collection[str]) -> None:
    """Cancel jobs that no run would know of."""
    if job_ids:
        try:
            slurm_client.run("scancel", *job_ids)
        except SlurmError as error:
            told = f"could not be cancelled: {error}; do it by: scancel {' '.join(job_ids)}"
            print(f"warning: job {', '.join(job_ids)} {told}", file=sys.stderr, flush=True)


def _id_in(said: str) -> str:
    """The id in what sbatch says: the last line that is one; a site's greeting may stand before and after it.

    Raises:
        SlurmError: there is none.
    """
    found = [match[1] for line in said.splitlines() if (match := _ID.fullmatch(line.strip()))]
    if not found:
        raise SlurmError(f"sbatch: its answer names no job: {said.strip() or 'nothing'}")
    return found[-1]


def _ask(name: str, logs: Path, known: Collection[str], error: SlurmError, *, num: int) -> str | None:
    """Ask the queue for a job ``num`` times.

    Raises:
        SlurmError: it does not answer.
    """
    for asked in range(num):
        if asked:
            time.sleep(PAUSE_S)
        try:
            found = [job_id for job_id in _queued(name, logs) if job_id not in known]
        except SlurmError as silent:
            if asked == num - 1:
                raise SlurmError(
                    f"{error}; whether there is a job is not known, for the queue does not answer either: {silent}; "
                    f"when it does: squeue --me --name={name}"
                ) from None
            continue
        if found:
            return found[-1]
    return None


def _queued(name: str, logs: Path) -> Iterator[str]:
    """Ids of one's own jobs of a name that write into a folder, oldest first."""
    fields = ",".join(f"{field}:{width}" for field, width in _WIDTHS.items())
    for line in slurm_client.run("squeue", "--noheader", "--me", "--states=all", f"--Format={fields}").splitlines():
        values, rest = [], line.encode()
        for width in _WIDTHS.values():
            values.append(rest[:width].decode(errors="replace").rstrip())
            rest = rest[width:]
        job_id, found, output = values
        if found == name and Path(output).parent == logs:
            yield job_id
