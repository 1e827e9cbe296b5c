"""``batch.tune_budget``: how long a run may measure before it trains, as a share of the time that it will train."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.engine.distributed import Ranks
    from launcher.engine.loading.data_sets import DataSets
    from launcher.recipe.schema import Recipe

LEAST_PROBES = {"throughput": 2, "memory": 3}
"""Probes that are made however short the run is: the first, which says how long it will be, and one that verifies a
larger batch; where the largest is asked for, which is predicted from these two, one more."""
LONGER = 0.5
"""Search again where a run is longer by more than this fraction than the one whose search was cut short."""
IN_TURNS = 0.25
"""Take turns in one probe for at most this part of what all of them may take."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a rank may spend on measuring."""

    share: float
    """Of the time that the run is expected to take."""
    images: int
    """Images that this rank trains on in the whole run."""

    @classmethod
    def of(cls, recipe: Recipe, ranks: Ranks, data_sets: DataSets) -> Budget:
        """That of a run: each rank trains on its part of the images in each epoch."""
        images = len(data_sets.train) * recipe.train.epochs // ranks.world_size
        return cls(share=recipe.batch.tune_budget, images=max(1, images))

    def run_s(self, images_per_s: float) -> float:
        """Seconds that the run is expected to take, trained at ``images_per_s`` on this rank."""
        return self.images / images_per_s

    def allows(self, *, images_per_s: float, spent_s: float, next_s: float) -> bool:
        """Whether a probe of ``next_s`` seconds may follow ``spent_s`` seconds of measuring."""
        return spent_s + next_s <= self.share * self.run_s(images_per_s)

    def turns_s(self, images_per_s: float) -> float:
        """Seconds for which one probe may time its steps."""
        return IN_TURNS * self.share * self.run_s(images_per_s)

    def is_served_by(self, kept: dict[str, Any]) -> bool:
        """Whether this run need not search again: what a shorter one found with few probes is not for a longer one."""
        run_s = kept.get("cut_for_s")  # an earlier version, which wrote none, cut nothing short
        return run_s is None or self.run_s(kept["images_per_s"]) <= run_s * (1 + LONGER)


class Spending:
    """What a search spends of its budget.

    Args:
        budget: of this rank; None: it is not bounded.
        objective: what is looked for.
        clock: tells the time in seconds.
    """

    def __init__(
        self, budget: Budget | None, *, objective: str = "throughput", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._budget = budget
        self._least = LEAST_PROBES[objective]
        self._clock = clock
        self._began = self._last = clock()
        self._longest_s = 0.0
        self.num_probes = 0
        """How many were made."""
        self.stopped_at: float | None = None
        """Seconds that the run was expected to take when a probe was refused; None: none was."""

    def note(self) -> None:
        """A probe has ended."""
        now = self._clock()
        # Not the first one alone: it loads libraries that the others find loaded.
        self._longest_s = max(self._longest_s if self.num_probes > 1 else 0.0, now - self._last)
        self._last = now
        self.num_probes += 1

    def allows_more(self, images_per_s: float, *, probes: int = 1) -> bool:
        """Whether as many probes may follow.

        Args:
            images_per_s: the best speed so far.
            probes: as long as the longest yet.
        """
        if self._budget is None or self.num_probes + probes <= self._least:
            return True
        spent_s, next_s = self._clock() - self._began, probes * self._longest_s
        allowed = self._budget.allows(images_per_s=images_per_s, spent_s=spent_s, next_s=next_s)
        if not allowed:
            self.stopped_at = self._budget.run_s(images_per_s)
        return allowed

    def told(self, batch_size: int) -> str:
        """What was refused, in a line."""
        assert self._budget  # noqa: S101  else nothing was refused
        count = f"{self.num_probes} probe{'s' if self.num_probes > 1 else ''}"
        share, run_s = f"{100 * self._budget.share:g} %", self.stopped_at or 0.0
        return (
            f"batch size {batch_size} by {count}: {share} of the run's estimated {run_s:.0f} s allow no more "
            "(batch.tune_budget)"
        )
