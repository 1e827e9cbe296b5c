"""Decides whether a run has ended, by its own status or by that of its SLURM job."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from launcher.backends import living
from launcher.runs import history, whereabouts

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir
    from launcher.runs.whereabouts import JobState

ENDED = (*whereabouts.OVER, "preempted")
"""States in which nothing runs any more."""
ASK_S = 10.0
"""Seconds between two questions to SLURM."""


class Ending:
    """The end of a run.

    A run that was preempted goes on where its job is queued again, and one whose job has died may never say so.

    Args:
        run: the run directory.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._asked = -math.inf
        self._has_job = False
        self._job: JobState | None = None

    def has_come(self) -> bool:
        """Whether the run is over. If SLURM does not answer, it is not."""
        status = self._run.read_status()
        has_ended = _has_ended(self._run, status)
        if has_ended and status["state"] != "preempted":
            return True
        if time.monotonic() - self._asked >= ASK_S:
            self._has_job, self._job = whereabouts.job_of(self._run) is not None, living.job_state(self._run)
            self._asked = time.monotonic()
        return self._job.over if self._job else has_ended and not self._has_job


def _has_ended(run: RunDir, status: dict[str, Any]) -> bool:
    """Whether the run's state says that nothing runs, and no worker was started since it was written."""
    if status["state"] not in ENDED:
        return False
    starts = history.events(run, "attempt_started")
    last = max((start.get("attempt", 0) for start in starts), default=0)
    # the earliest time: other nodes' clocks may be ahead of the one that wrote the state
    started = min((start["time"] for start in starts if start.get("attempt", 0) == last), default=0.0)
    return bool(started <= status.get("updated", started))
