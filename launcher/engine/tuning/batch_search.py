"""Finds the batch size that trains fastest within the memory, with few probes; every answer was really tried."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from launcher.engine.tuning.budget import Spending
from launcher.engine.tuning.child import OutOfMemoryError, TooSlowError
from launcher.engine.tuning.speed_line import towards_the_line
from launcher.errors import UsageError
from launcher.system import phases

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.engine.tuning.probe import Probe

Objective = Literal["throughput", "memory"]

MULTIPLE = 8
"""From 8 up, batch sizes are multiples of 8: tensor cores and vector units come in eights."""
GROWTH, FAST_GROWTH = 4, 16
PROPORTIONAL = 0.8
"""The plateau is far if the speeds' ratio is more than this fraction of the batches' ratio."""
CLOSE = 0.1
"""Try no size between two that differ by at most this fraction, to find out which fits."""
MIN_GAP = 0.25
"""Try no size between two that differ by less than this fraction, to find out which is faster."""
PROMISING = 0.96
"""Gaps whose expected speed is at least this fraction of the peak's are equally promising."""
PER_DOUBLING = 0.05
"""A gap is this much more promising for each doubling between its ends."""
NEAR_PEAK = 0.98
"""Take the smallest batch with at least this fraction of the peak's images per second."""
FEW = 3
"""With at most this many attempts, a jump between the two largest may spoil the prediction from them."""
MAX_PROBES, MAX_PROBES_BISECTING = 6, 10
CONTENDER, MAX_CONTENDERS, MAX_COMPARED = 0.85, 3, 5
"""Compare in turn at most 3 sizes with at least 0.85 of the peak's speed, or 5 with new ones between them and the next
fastest. Speeds of separate probes vary on a shared machine."""


class NothingFitsError(UsageError):
    """Not even a single image fits."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A batch size that was tried."""

    batch_size: int
    """Images at once."""
    needed_bytes: int | None
    """Memory that training with it needs; None: unknown."""
    probe: Probe | None
    """What was measured; None where it did not run."""
    problem: str = ""
    """Why it cannot be used; empty: it fits."""

    def describe(self) -> dict[str, Any]:
        """As ``tuning.json`` has it."""
        speed = round(self.probe.images_per_s, 2) if self.probe else None
        return {
            "batch_size": self.batch_size,
            "images_per_s": speed,
            "needed_bytes": self.needed_bytes,
            "problem": self.problem,
        }


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search."""

    chosen: Attempt
    """The best size for the objective."""
    largest: Attempt
    """The largest that is known to fit."""
    attempts: tuple[Attempt, ...]
    """All that were tried, in their order."""
    compared: tuple[int, ...]
    """Batch sizes whose speeds were measured in turn."""
    num_probes: int
    """Processes that the search started."""

    def describe(self) -> dict[str, Any]:
        """As ``tuning.json`` has it."""
        chosen = self.chosen.probe
        assert chosen  # noqa: S101  it ran
        return {
            "batch_size": self.chosen.batch_size,
            "max_size": self.largest.batch_size,
            "images_per_s": round(chosen.images_per_s, 2),
            "needed_bytes": self.largest.needed_bytes,
            "attempts": [one.describe() for one in self.attempts],
            "compared": list(self.compared),
            "num_probes": self.num_probes,
        }


class BatchSearch:
    """Finds the batch size for one device.

    Memory grows in a line with the batch, but for jumps (libraries' workspaces), so a line through the two largest that
    ran says how far to go; what it says is tried before it is believed, and bisected where it was wrong. Speed rises to
    a plateau, at which small batches do as well as large ones.

    Args:
        measure: runs a batch size, in turn with what was measured of a smaller one, if any; or raises OutOfMemoryError
            or TooSlowError.
        compare: runs several in turn; of the memory of each it may say too much. Raises as ``measure`` does.
        needed: bytes that training takes, of which a probe measured a part.
        budget_bytes: what there is.
        objective: what is looked for.
        max_size: the largest batch that makes sense.
        spending: of what it may spend; None: it is not bounded.
    """

    def __init__(
        self,
        measure: Callable[[int, Probe | None], Probe],
        *,
        compare: Callable[[Sequence[int]], Sequence[Probe]],
        needed: Callable[[Probe], int],
        budget_bytes: int,
        objective: Objective,
        max_size: int,
        spending: Spending | None = None,
    ) -> None:
        self._spending = spending or Spending(None)
        self._measure = measure
        self._compare = compare
        self._needed = needed
        self._budget = budget_bytes
        self._objective = objective
        self._max_size = max_size
        self._attempts: list[Attempt] = []
        self._surprised = False
        """Whether a size failed that was predicted to fit."""

    def run(self) -> Found:
        """Search.

        Raises:
            NothingFitsError: not even one image fits.
        """
        size = self._smallest()
        if size >= min(MULTIPLE, self._max_size):
            self._grow(size)
            if self._objective == "throughput":
                self._refine()
        if self._objective == "memory":
            return self._found(self._fitting()[-1], ())
        compared = self._compare_in_turn()
        contenders = [one for one in self._fitting() if not compared or one.batch_size in compared]
        peak = max(map(_speed, contenders))
        noise = statistics.mean(one.probe.noise for one in contenders if one.probe)
        near = min(1.0, NEAR_PEAK + noise)  # do not give up speed for a smaller batch on the strength of noise
        chosen = next(one for one in contenders if _speed(one) >= near * peak)
        return self._found(chosen, compared)

    def _found(self, chosen: Attempt, compared: tuple[int, ...]) -> Found:
        return Found(
            chosen=chosen,
            largest=self._fitting()[-1],
            attempts=tuple(self._attempts),
            compared=compared,
            num_probes=self._spending.num_probes,
        )

    def _smallest(self) -> int:
        """The first size that fits: 8, or the largest below it that does."""
        size = min(MULTIPLE, self._max_size)
        while not self._try(size):
            if size == 1:
                raise NothingFitsError(self._nothing_fits())
            size //= 2
        while (failed := self._failed(above=size)) and failed[0] > size + 1:
            middle = (size + failed[0]) // 2
            size = middle if self._try(middle) else size
        return size

    def _grow(self, size: int) -> None:
        """Go up in big steps while it serves the objective and the memory is predicted to suffice."""
        while self._may_try():
            following = self._following(size)
            if following <= size:
                return
            if self._try(following):
                size = following
            if self._objective == "throughput" and self._has_peaked():
                return

    def _following(self, size: int) -> int:
        """The next size to try, beyond the largest that fits; ``size`` itself where there is none."""
        failed = self._failed(above=size)
        if failed and failed[0] - size <= max(MULTIPLE, CLOSE * size):
            return size
        if failed:  # between what fits and what does not
            middle = _whole((size + failed[0]) / 2)
            middle = middle if middle > size else _whole(size) + MULTIPLE
            return middle if middle < failed[0] else size
        predicted, aim = self._predict(), size * (FAST_GROWTH if self._still_doubles() else GROWTH)
        if predicted is not None and (self._objective == "memory" or predicted < aim * 1.25):
            aim = _whole(predicted)
            if aim <= size and (self._objective == "memory" or len(self._attempts) <= FEW):
                # A line through a jump is too steep: a little more than it allows shows whether it is.
                aim = max(_whole(size * (1 + CLOSE)), size + MULTIPLE)
        return min(_whole(aim), self._max_size)

    def _still_doubles(self) -> bool:
        """Whether speed has grown nearly in proportion to the batch, of late."""
        two = self._fitting()[-2:]
        if len(two) < 2:  # noqa: PLR2004
            return False
        return _speed(two[1]) / _speed(two[0]) > PROPORTIONAL * two[1].batch_size / two[0].batch_size

    def _predict(self) -> int | None:
        """The largest batch for which, by a line through the two largest that ran, the memory suffices."""
        ran = sorted((a for a in self._attempts if a.probe), key=lambda a: a.batch_size)[-2:]
        if len(ran) < 2:  # noqa: PLR2004  a line needs two points
            return None
        (one, other), (low, high) = (a.batch_size for a in ran), (a.needed_bytes or 0 for a in ran)
        per_image = (high - low) / (other - one)
        if per_image <= 0:
            return None
        return int(other + (self._budget - high) / per_image)

    def _has_peaked(self) -> bool:
        """Whether the largest of at least three sizes is no faster than a smaller one."""
        fitting = self._fitting()
        if len(fitting) < 3:  # noqa: PLR2004
            return False
        return _speed(fitting[-1]) * NEAR_PEAK <= max(map(_speed, fitting[:-1]))

    def _refine(self) -> None:
        """Try what lies beside the fastest: speed is no smooth curve of the batch (tiles and caches have sizes)."""
        while self._may_try(but=1) and (middles := self._middles()):  # the last one compares
            self._try(middles[0])

    def _middles(self) -> list[int]:
        """Sizes that were not tried and may be faster than all, or smaller and nearly as fast; the best guess first.

        They are in the middle of gaps beside one that is near the peak: of those first that are wide, and between whose
        ends the speed promises to be high.
        """
        fitting = self._fitting()
        peak, tried = max(map(_speed, fitting)), {a.batch_size for a in self._attempts}
        gaps = []
        for low, high in itertools.pairwise(fitting):
            middle = _middle_between(low.batch_size, high.batch_size)
            if middle and middle not in tried and max(_speed(low), _speed(high)) >= NEAR_PEAK * peak:
                doublings = round(math.log2(high.batch_size / low.batch_size))
                between = (_speed(low) * _speed(high)) ** 0.5 / peak
                gaps.append((-min(between, PROMISING) - PER_DOUBLING * doublings, middle))
        return [middle for _, middle in sorted(gaps)]

    def _try(self, size: int) -> bool:
        most = MAX_PROBES_BISECTING if self._surprised else MAX_PROBES
        phases.update(f"{self._spending.num_probes + 1} of at most {most} ({size} images)")
        predicted = self._predict()
        smaller = [one.probe for one in self._fitting() if one.batch_size < size]
        try:
            fits = self._add(size, self._measure(size, smaller[-1] if smaller else None))
        except (OutOfMemoryError, TooSlowError) as error:
            fits = self._add(size, None, str(error) or type(error).__name__)
        self._spending.note()
        self._surprised |= not fits and (predicted is None or size <= predicted)
        return fits

    def _add(self, size: int, probe: Probe | None, problem: str = "") -> bool:
        """Record the result of a size; return whether it fits."""
        needed = self._needed(probe) if probe else None
        if needed is not None and needed > self._budget:
            problem = "takes more than there is"
        self._attempts.append(Attempt(batch_size=size, needed_bytes=needed, probe=probe, problem=problem))
        return not problem

    def _compare_in_turn(self) -> tuple[int, ...]:
        """Take the speeds of the fastest sizes from one more probe, which runs them in turn, and some between them."""
        fastest = sorted(self._fitting(), key=_speed, reverse=True)
        near = [a for a in fastest[:MAX_CONTENDERS] if _speed(a) >= CONTENDER * _speed(fastest[0])]
        worth_it = [*(a.batch_size for a in near), *self._middles()]
        if len(worth_it) == 1 or not self._may_try():
            return ()
        sizes = sorted([*worth_it, *(a.batch_size for a in fastest[len(near) :])][:MAX_COMPARED])
        phases.update("again, the fastest in turn")
        try:
            probes = {probe.batch_size: probe for probe in towards_the_line(self._compare(sizes))}
        except (OutOfMemoryError, TooSlowError):  # all of them in one process are too much for it
            return ()
        finally:
            self._spending.note()
        for index, known in enumerate(self._attempts):
            found = probes.pop(known.batch_size, None)
            if found and known.probe:
                probe = replace(known.probe, images_per_s=found.images_per_s, noise=found.noise)
                self._attempts[index] = replace(known, probe=probe)
        for new in probes.values():
            self._add(new.batch_size, new)
        return tuple(sizes)

    def _may_try(self, *, but: int = 0) -> bool:
        """Whether a probe is left, after ``but`` others, and may be paid for."""
        if self._spending.num_probes + but >= (MAX_PROBES_BISECTING if self._surprised else MAX_PROBES):
            return False
        return self._spending.allows_more(max(map(_speed, self._fitting())), probes=1 + but)

    def _fitting(self) -> list[Attempt]:
        return sorted((a for a in self._attempts if not a.problem), key=lambda a: a.batch_size)

    def _failed(self, *, above: int) -> list[int]:
        return sorted(a.batch_size for a in self._attempts if a.problem and a.batch_size > above)

    def _nothing_fits(self) -> str:
        last = self._attempts[-1]
        needed = f"needed {last.needed_bytes / 1e9:.2f} GB" if last.needed_bytes else f"more is needed ({last.problem})"
        free = f"{self._budget / 1e9:.2f} GB"
        return f"batch.size: auto: not even a batch of {last.batch_size} image fits: {needed}, free to take {free}"


def _speed(attempt: Attempt) -> float:
    assert attempt.probe  # noqa: S101  it fits, so it ran
    return attempt.probe.images_per_s


def _middle_between(low: int, high: int) -> int | None:
    """A batch size in the middle of two, in proportion; 16, 24, 32, 48, 64, 96 and so on where there is room."""
    if high < low * (1 + MIN_GAP):
        return None
    middle = (low * high) ** 0.5
    step = 2 ** max(0, int(math.log2(middle)) - 1)
    rounded = round(middle / step) * step
    for size in (rounded if rounded % MULTIPLE == 0 else 0, round(middle / MULTIPLE) * MULTIPLE):
        if low < size < high:
            return size
    return None


def _whole(size: float) -> int:
    """As a batch size: a multiple of 8, unless it is smaller than that."""
    return int(size) // MULTIPLE * MULTIPLE if size >= MULTIPLE else int(size)
