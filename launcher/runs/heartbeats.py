"""Heartbeats: a worker writes the time, and what it is about to do, into memory that its node's supervisor reads."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass

from launcher.system import processes

DUMP_SIGNAL = signal.SIGUSR1
"""On this signal a worker writes the stacks of all its threads into its log (faulthandler)."""
TRAINING = "training"
STARTING = "starting"
MEASURING = "measuring batch sizes"
MEETING = "meeting the other workers"
JOINING = "making the process group"
BUILDING = "building what it trains"
FIRST = "taking its first step"
PHASES = (TRAINING, STARTING, MEASURING, MEETING, JOINING, BUILDING, FIRST)
TELLING = (STARTING, MEASURING, MEETING)
"""Phases in which a worker that waits for another one says all the while that it lives."""
START_FACTOR, START_LEAST_S = 3, 30.0
"""Before its first step is taken a worker may be silent for three times as long as later, and for half a minute: it
reads weights, lists images, compiles."""
GROUP_MARGIN_S = 300.0
NEVER_S = 24 * 3600.0
_CELL = struct.Struct("dqqq")
_KILLS = struct.Struct("q")
_PID = struct.Struct("q")
_FAILED = -1.0


def patience_s(hang_timeout_s: float, phase: str) -> float:
    """How long a worker may be silent in a phase before it counts as hung."""
    return hang_timeout_s if phase == TRAINING else max(START_FACTOR * hang_timeout_s, START_LEAST_S)


def group_timeout_s(hang_timeout_s: float | None) -> float:
    """After how long a collective gives up: later than the watchdog, which knows what each worker was doing.

    Args:
        hang_timeout_s: of the recipe; None: workers may be silent for ever.
    """
    return NEVER_S if hang_timeout_s is None else patience_s(hang_timeout_s, JOINING) + GROUP_MARGIN_S


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A worker's last sign of life."""

    age_s: float
    """Seconds since it."""
    pid: int
    """Process id of the worker."""
    rank: int
    """Its rank, among all workers."""
    phase: str = TRAINING
    """What it has been doing since."""


class Heartbeats:
    """A cell of shared memory for each local worker; made before they are forked. Writing one takes a microsecond."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._kills_at = _CELL.size * num
        self._pids_at = self._kills_at + _KILLS.size
        self._memory = mmap.mmap(-1, self._pids_at + _PID.size * num)

    def enter(self, local_rank: int) -> None:
        """A worker has started."""
        _PID.pack_into(self._memory, self._pids_at + local_rank * _PID.size, os.getpid())

    def leave(self, local_rank: int) -> None:
        """A worker has ended, but for the acknowledgement of torch's agent."""
        _PID.pack_into(self._memory, self._pids_at + local_rank * _PID.size, 0)

    def living(self) -> list[int]:
        """Process ids of the workers that have started and have not ended."""
        pids = [_PID.unpack_from(self._memory, self._pids_at + index * _PID.size)[0] for index in range(self._num)]
        return [pid for pid in pids if pid and processes.start_time(pid)]

    def begin(self, num_kills: int) -> None:
        """Training begins: batch sizes are no longer tried. The first worker of the node to call this counts.

        Args:
            num_kills: processes that the kernel has killed so far; those that tried batch sizes may be among them.
        """
        if self.kills_before is None:
            _KILLS.pack_into(self._memory, self._kills_at, num_kills + 1)

    @property
    def kills_before(self) -> int | None:
        """Processes that the kernel had killed when training began; None: it has not begun."""
        (told,) = _KILLS.unpack_from(self._memory, self._kills_at)
        return told - 1 if told else None

    def beat(self, local_rank: int, rank: int, phase: str = TRAINING) -> None:
        """Record that a step was taken, a batch validated, or a phase before the first step begun or got on with."""
        values = time.monotonic(), os.getpid(), rank, PHASES.index(phase)
        _CELL.pack_into(self._memory, local_rank * _CELL.size, *values)

    def rest(self, local_rank: int) -> None:
        """Expect no more steps from this worker."""
        _CELL.pack_into(self._memory, local_rank * _CELL.size, 0.0, 0, 0, 0)

    def fail(self, local_rank: int) -> None:
        """Record that this worker failed, for its peers, in case its error file cannot be written."""
        _CELL.pack_into(self._memory, local_rank * _CELL.size, _FAILED, 0, 0, 0)

    @property
    def any_failed(self) -> bool:
        """Whether a worker of this node failed."""
        return any(then == _FAILED for then, *_ in self._cells())

    def clear(self) -> None:
        """Forget the workers of an attempt that is over."""
        for local_rank in range(self._num):
            self.rest(local_rank)
            _PID.pack_into(self._memory, self._pids_at + local_rank * _PID.size, 0)
        _KILLS.pack_into(self._memory, self._kills_at, 0)

    def read(self) -> list[Beat]:
        """The last heartbeats of workers that have started and expect more steps."""
        now = time.monotonic()
        return [
            Beat(age_s=now - then, pid=pid, rank=rank, phase=PHASES[phase])
            for then, pid, rank, phase in self._cells()
            if then > 0
        ]

    def _cells(self) -> list[tuple[float, int, int, int]]:
        return [_CELL.unpack_from(self._memory, index * _CELL.size) for index in range(self._num)]
