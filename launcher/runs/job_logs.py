"""The last lines of what a SLURM job wrote beside its workers' logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from launcher.runs.run_dir import RunDir

LAST_LINES = 5
"""Lines shown of each log."""
NOISE = ("srun: job ", "srun: Job step aborted", "srun: launch/slurm", "srun: Force Terminated", "*** STEP")
"""Lines that srun writes about every step that it ends: they are left out."""


def last_words(run: RunDir, job_id: str) -> list[str]:
    """The last lines of each node's standard error, and of the batch script's log."""
    logs = [*sorted(run.supervisor_log(job_id, 0).parent.glob(f"{job_id}_*_log.err")), run.batch_log(job_id)]
    found: dict[str, str] = {}  # several nodes say the same; it stands there once, with the first that said it
    for log in logs:
        for line in _last_lines(log):
            found.setdefault(line, log.name)
    return [f"  {name}: {line}" for line, name in found.items()]


def _last_lines(log: Path) -> Iterator[str]:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    yield from [line for line in lines if line.strip() and not any(word in line for word in NOISE)][-LAST_LINES:]
