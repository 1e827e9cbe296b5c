"""A run that is watched: its files, and what SLURM says of its job."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from launcher.backends import living
from launcher.commands.run_end import Ending
from launcher.runs import whereabouts
from launcher.runs.progress import Progress, Snapshot

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir
    from launcher.runs.whereabouts import JobState

LOOK_S = 1.0
"""Seconds between two looks at the files."""
ASK_S = 15.0
"""Seconds between two questions to SLURM."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What is shown of a run."""

    snapshot: Snapshot
    """From its files."""
    job: JobState | None
    """As SLURM sees its job; None: it has none, or SLURM does not answer."""
    shown: str
    """Its state in people's word."""


class Watched:
    """A run that is watched.

    Args:
        run: its directory.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._progress = Progress(run)
        self._ending = Ending(run)
        self._asked: float | None = None
        self._job: JobState | None = None

    def look(self) -> View:
        """It now."""
        if self._asked is None or time.monotonic() - self._asked >= ASK_S:
            self._job, self._asked = living.job_state(self._run), time.monotonic()
        snapshot = self._progress.look()
        state = whereabouts.settled(snapshot.state, self._job)  # type: ignore[arg-type]  # as written in status.json
        shown = whereabouts.shown(self._run, state)
        return View(snapshot=replace(snapshot, state=state), job=self._job, shown=shown)

    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._ending.has_come()

    def to_dict(self) -> dict[str, object]:
        """For programs."""
        view = self.look()
        job = view.job and {"job_id": view.job.job_id, "state": view.job.state, "reason": view.job.reason}
        return view.snapshot.to_dict() | {"job": job}


def state_text(view: View) -> str:
    """The state, and why a job waits."""
    job = view.job
    if job and job.state == "PENDING":
        return f"queued ({job.reason})" if job.reason not in ("", "None") else "queued"
    return view.shown


def slowest_text(slowest: dict[str, Any]) -> str:
    """The rank that the others wait for, in words."""
    return f"rank {slowest['rank']} is {slowest['behind']:.0%} slower than the median rank, by its {slowest['cause']}"
