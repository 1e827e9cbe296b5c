"""A node's part in one generation, while its workers train."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Self

from launcher.node.part import Part
from launcher.system import processes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.node.elastic.course import Course
    from launcher.runs.run_dir import RunDir


class ElasticPart(Part):
    """In a run that shrinks and grows. While entered, the leader's looks for nodes that wait to be taken in.

    Args:
        run: the run directory.
        course: of this node; in the generation that its workers train in.
    """

    outlives_loss = True
    when_lost = "going on without it"

    def __init__(self, run: RunDir, course: Course) -> None:
        self._run = run
        self._course = course
        self._usher = course.usher()
        self._ranks: Sequence[str] = ()
        self.hosts = course.hosts
        self.environment = course.environment

    def __enter__(self) -> Self:
        self._usher.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._usher.__exit__()

    @property
    def is_over(self) -> bool:
        """Whether they have."""
        return self._course.is_over

    @property
    def is_saving(self) -> bool:
        """Whether rank 0 does so here."""
        return "0" in self._ranks and any(self._run.checkpoints.glob(".step-*"))

    def began(self, ranks: Sequence[str]) -> None:
        """Note where rank 0 is."""
        self._ranks = ranks

    def heed(self, living: Sequence[int]) -> None:
        """Hand a stop on between the nodes; tell the workers to leave where others are taken in."""
        self._course.heed()
        if self._usher.calls:
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, processes.telling_signal())
