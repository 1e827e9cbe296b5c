"""How a step's samples are spread over ranks that differ in speed and memory."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.engine.schedule import Batching
from launcher.engine.tuning.batch_search import MULTIPLE

if TYPE_CHECKING:
    from collections.abc import Sequence

SAME_SPEED = 0.08
"""Treat devices of one kind as equally fast if their speeds differ by at most this fraction: that is the noise."""
IN_EIGHTS = 64
"""From this size up, batches computed from shares are multiples of 8."""
SHARES = 1000


@dataclass(frozen=True, kw_only=True)
class RankBatch:
    """What one rank found for itself."""

    device: str
    """Its kind."""
    batch_size: int
    """The best one."""
    max_size: int
    """The largest that is known to fit."""
    images_per_s: float
    """With the best one."""
    cut_for_s: float | None = None
    """Not None where a short run measured in few turns: too roughly to tell devices of one kind apart."""


def deal(ranks: Sequence[RankBatch], *, global_size: int | None, accumulate: int) -> Batching:
    """Give every rank samples in proportion to its speed, so that none waits for another, within its memory.

    Args:
        ranks: what each found.
        global_size: images per optimizer step, kept exactly; None: what the ranks take at once, ``accumulate`` times.
        accumulate: where ``global_size`` is None.

    Returns:
        With a global size each rank has its best batch size, and goes through the model as often as its share takes.
        Else a step takes the time that the slowest to do so needs for its best batch, and shares are what each does in
        that time: at once, or where its memory does not hold them in several batches of its best size.
    """
    speeds = _level(ranks)
    if global_size is not None:
        shares = tuple(max(1, round(SHARES * speed / max(speeds))) for speed in speeds)
        return Batching(
            batch_sizes=tuple(rank.batch_size for rank in ranks), shares=shares, global_batch_size=global_size
        )
    seconds = max(rank.batch_size / speed for rank, speed in zip(ranks, speeds, strict=True))
    shares = tuple(_round(seconds * speed) for speed in speeds)
    sizes = tuple(
        share if share <= rank.max_size else rank.batch_size for rank, share in zip(ranks, shares, strict=True)
    )
    return Batching(batch_sizes=sizes, shares=shares, global_batch_size=sum(shares) * accumulate)


def _level(ranks: Sequence[RankBatch]) -> list[float]:
    """The ranks' speeds, without the noise between equal devices."""
    by_kind: dict[str, list[float]] = {}
    for rank in ranks:
        by_kind.setdefault(rank.device, []).append(rank.images_per_s)
    middles = {kind: statistics.median(speeds) for kind, speeds in by_kind.items()}
    return [
        middles[rank.device]
        if rank.cut_for_s is not None or abs(rank.images_per_s / middles[rank.device] - 1) <= SAME_SPEED
        else rank.images_per_s
        for rank in ranks
    ]


def _round(size: float) -> int:
    return int(size + 1e-6) // MULTIPLE * MULTIPLE if size >= IN_EIGHTS else max(1, round(size))
