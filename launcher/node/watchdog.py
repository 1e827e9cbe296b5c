"""Finds workers that hang: each says after every step that it lives, in memory that its node's supervisor reads."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from launcher.runs.run_dir import node_name
from launcher.system import processes
from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.runs.run_dir import RunDir

DUMP_SIGNAL = signal.SIGUSR1
"""On it a worker writes the stacks of all its threads into its log (faulthandler)."""
POLL_S = 1.0
DUMP_S = 3.0
"""How long the workers get to write their stacks before they are killed."""
WAITING = (
    "torch/autograd/",
    "torch/distributed/",
    "torch/nn/parallel/",
    "launcher/engine/distributed.py",
    # A GPU waits in the collective, and the host goes on to where it next waits for the GPU.
    "torch/cuda/",
    "torch/amp/",
    "torch/functional.py",
    "launcher/engine/metrics.py",
    "launcher/engine/non_finite.py",
)
"""Files of the innermost call of a worker that waits for the others. The outer ones are torch's in any worker."""
TAIL_BYTES = 64 * 1024
_CELL = struct.Struct("dqq")
_KILLS = struct.Struct("q")
_PID = struct.Struct("q")
_FAILED = -1.0


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A worker's last sign of life."""

    age_s: float
    """How long ago."""
    pid: int
    """Of the worker."""
    rank: int
    """Of the worker, among all."""


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

    def living(self) -> list[int]:
        """Process ids of the workers that have started and have not ended."""
        pids = [_PID.unpack_from(self._memory, self._pids_at + index * _PID.size)[0] for index in range(self._num)]
        return [pid for pid in pids if pid and processes.start_time(pid)]

    def begin(self, num_kills: int) -> None:
        """Nothing is tried any more, this node's workers train; the first one's word counts.

        Args:
            num_kills: processes that the kernel has killed so far; those that tried batch sizes may be among them.
        """
        if self.kills_before is None:
            _KILLS.pack_into(self._memory, self._kills_at, num_kills + 1)

    @property
    def kills_before(self) -> int | None:
        """Processes that the kernel had killed when training began; None: it has not."""
        (told,) = _KILLS.unpack_from(self._memory, self._kills_at)
        return told - 1 if told else None

    def beat(self, local_rank: int, rank: int) -> None:
        """A step was taken, a batch was validated."""
        _CELL.pack_into(self._memory, local_rank * _CELL.size, time.monotonic(), os.getpid(), rank)

    def rest(self, local_rank: int) -> None:
        """No step is to be expected any more."""
        _CELL.pack_into(self._memory, local_rank * _CELL.size, 0.0, 0, 0)

    def fail(self, local_rank: int) -> None:
        """This worker failed; for its peers, where the disk does not take its error file."""
        _CELL.pack_into(self._memory, local_rank * _CELL.size, _FAILED, 0, 0)

    @property
    def any_failed(self) -> bool:
        """Whether a worker of this node failed."""
        return any(then == _FAILED for then, _, _ in self._cells())

    def clear(self) -> None:
        """Forget the workers of an attempt that is over."""
        for local_rank in range(self._num):
            self.rest(local_rank)
            _PID.pack_into(self._memory, self._pids_at + local_rank * _PID.size, 0)
        _KILLS.pack_into(self._memory, self._kills_at, 0)

    def read(self) -> list[Beat]:
        """Of the workers that have taken a step and have others to take."""
        now = time.monotonic()
        return [Beat(age_s=now - then, pid=pid, rank=rank) for then, pid, rank in self._cells() if then > 0]

    def _cells(self) -> list[tuple[float, int, int]]:
        return [_CELL.unpack_from(self._memory, index * _CELL.size) for index in range(self._num)]


class Watchdog:
    """While entered, ends workers of which one has taken no step for too long, and leaves what each was doing.

    Args:
        run: where the error files go.
        beats: of this node's workers.
        timeout_s: how long is too long; None: there is no such time.
        node_rank: which node this is.
        attempt: the number of the present start of the workers.
    """

    def __init__(
        self, run: RunDir, beats: Heartbeats, *, timeout_s: float | None, node_rank: int, attempt: Callable[[], int]
    ) -> None:
        self._run = run
        self._beats = beats
        self._timeout_s = timeout_s
        self._node_rank = node_rank
        self._attempt = attempt
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if self._timeout_s is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(POLL_S):
            found = self._beats.read()
            if self._timeout_s and any(beat.age_s > self._timeout_s for beat in found):
                self._end(found)
                self._beats.clear()

    def _end(self, found: list[Beat]) -> None:
        attempt = self._attempt()
        print(f"no step for {self._timeout_s:g} s: the workers hang; their stacks go to their logs", flush=True)
        stopped = [beat for beat in found if processes.is_stopped(beat.pid)]
        _signal(found, DUMP_SIGNAL)
        _signal(stopped, signal.SIGCONT)  # by SIGSTOP or a debugger: it writes only when it goes on
        for beat in found:
            _ask_flight_recorder(Path(f"{self._run.nccl_pipe(attempt)}{beat.rank}.pipe"))
        time.sleep(DUMP_S / 6)
        _signal(stopped, signal.SIGSTOP)
        time.sleep(DUMP_S * 5 / 6)
        for beat in found:
            stack = _last_stack(self._run, attempt, beat.rank)
            top = next((line for line in stack if line.lstrip().startswith("File")), "an unknown place").strip()
            error = {
                "time": time.time(),
                "attempt": attempt,
                "rank": beat.rank,
                "node": self._node_rank,
                "host": node_name(),
                "kind": "hang",
                "waiting": any(place in top for place in WAITING),
                "type": "hang",
                "message": f"no step for {beat.age_s:.0f} s (train.hang_timeout_s); it is in {top}",
                "traceback": "\n".join(stack),
            }
            with contextlib.suppress(OSError):  # a full disk must not keep them alive
                write_json_atomic(self._run.rank_error(attempt, beat.rank), error)
        _signal(found, signal.SIGKILL)


def _signal(found: list[Beat], number: signal.Signals) -> None:
    for beat in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(beat.pid, number)


def _ask_flight_recorder(pipe: Path) -> None:
    """Have a worker write down its last collectives; only NCCL has such a pipe."""
    with contextlib.suppress(OSError):
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(descriptor, b"1\n")
        finally:
            os.close(descriptor)


def _last_stack(run: RunDir, attempt: int, rank: int) -> list[str]:
    """The main thread's stack in the last dump of a rank's log, innermost call first."""
    try:
        with run.rank_log(attempt, rank).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    blocks = re.findall(r"^Current thread [^\n]*\n((?:  [^\n]*\n?)+)", text, re.MULTILINE)
    return blocks[-1].rstrip().splitlines() if blocks else []
