"""What ranks tell each other while they measure, before there is a process group: children fork from them until then.

They meet in the store of torch's agent. A rank that fails there ends its peers by the agent, as ever, and one that is
asked to stop says so in the place of a result; who waits heeds its own stop.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch.distributed import PrefixStore

from launcher.engine.distributed import agents_store
from launcher.engine.numerics import Preference
from launcher.engine.tuning.cache import SAME_BUDGET
from launcher.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.engine.distributed import Ranks

LOOK_S = 0.2
"""How often a rank that waits for another one looks whether that has spoken, and whether it is to stop."""
WAIT_S = 1800.0
"""Give up after this long without a word from another rank."""


@dataclass(frozen=True, kw_only=True)
class Introduction:
    """What a rank says of itself first."""

    preference: Preference
    """Who it is, and what it would compute in if it were alone."""
    node_rank: int
    """Which node it is on."""
    total_bytes: int
    """Its device's memory."""
    free_bytes: int
    """What of it this rank may use."""
    cores: int
    """CPU cores of this rank."""
    own_device: bool
    """Whether it computes on a device of its own: a GPU, not the node's CPU."""

    @property
    def rank(self) -> int:
        """Among all workers."""
        return self.preference.rank

    @property
    def kind(self) -> tuple[Any, ...]:
        """What ranks that can measure for each other have in common."""
        return self.node_rank, self.own_device, self.preference.device, self.total_bytes, self.cores


def measurer(everyone: Sequence[Introduction], rank: int) -> int:
    """Which rank measures for ``rank``: one of the same node whose device is of the same kind and as free.

    Of several it is the one with the least free memory: what fits there fits on all. On a CPU each rank measures for
    itself, at the same time as its peers: they share memory, caches and cores, and one that measured alone would find a
    faster CPU than training has.
    """
    own = next(one for one in everyone if one.rank == rank)
    if not own.own_device:
        return rank
    alike = [one for one in everyone if one.kind == own.kind and one.free_bytes <= own.free_bytes]
    chosen, *others = sorted(alike, key=lambda one: (one.free_bytes, one.rank))
    for one in others:
        if one.free_bytes > chosen.free_bytes * (1 + SAME_BUDGET):
            chosen = one
    return chosen.rank


class PeerEndedError(Exception):
    """A rank has ended its measuring before it said anything of itself; ``report`` says why."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(report)
        self.report = report


class Peers:
    """The ranks of a run, for one of them.

    Args:
        ranks: who this is.
        heed_stop: called again and again while it waits; may raise.
    """

    def __init__(self, ranks: Ranks, heed_stop: Callable[[], None]) -> None:
        self._store: PrefixStore | None = None
        self._ranks = ranks
        self._heed_stop = heed_stop

    def exchange(self, own: Introduction) -> list[Introduction]:
        """Those of all ranks, in their order; of this one alone where there is no store to meet in.

        Raises:
            PeerEndedError: some rank will not say anything.
        """
        self._open(self._heed_stop)
        if self._store is None:
            return [own]
        self._tell("introduction", asdict(own))
        found = [self._hear("introduction", rank) for rank in range(self._ranks.world_size)]
        return [Introduction(**one | {"preference": Preference(**one["preference"])}) for one in found]

    def tell(self, report: dict[str, Any]) -> None:
        """Give what this rank found to those for which it measures."""
        if "stopped" not in report:  # else a rank that never met the others has nothing to tell them
            self._open(lambda: None)
        self._tell("report", report)

    def hear(self, rank: int) -> dict[str, Any]:
        """What ``rank`` has found; waits for it."""
        return self._hear("report", rank)

    def _open(self, alive: Callable[[], None]) -> None:
        if self._store is None and self._ranks.world_size > 1:
            store = agents_store(self._ranks, alive)
            self._store = PrefixStore("tuning", store) if store else None

    def _tell(self, kind: str, value: dict[str, Any]) -> None:
        if self._store is not None:
            self._store.set(f"{kind}/{self._ranks.rank}", json.dumps(value))

    def _hear(self, kind: str, rank: int) -> dict[str, Any]:
        assert self._store is not None  # noqa: S101  there is another rank only where there is a store
        key, end, until = f"{kind}/{rank}", f"report/{rank}", time.monotonic() + WAIT_S
        while not self._store.check([key]):
            self._heed_stop()
            if self._store.check([end]) and not self._store.check([key]):
                raise PeerEndedError(json.loads(self._store.get(end)))
            if time.monotonic() > until:
                raise TrainingError(f"rank {rank} has told nothing for {timedelta(seconds=WAIT_S)}")
            time.sleep(LOOK_S)
        found: dict[str, Any] = json.loads(self._store.get(key))
        return found
