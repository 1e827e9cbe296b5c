"""Finds workers that hang, by the heartbeats that they write from their start on, and after every step."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from launcher.runs.heartbeats import DUMP_SIGNAL, TELLING, TRAINING, patience_s
from launcher.runs.run_dir import node_name
from launcher.system import processes, waiting
from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.runs.heartbeats import Beat, Heartbeats
    from launcher.runs.run_dir import RunDir

POLL_S = 1.0
DUMP_S = 3.0
"""Seconds that the workers get to write their stacks before they are killed."""
DUMP_FACTOR = 5
"""So much longer where one has written none yet: its machine or its disk may be busy."""
LOOK_S = 0.05
"""Seconds between two looks whether they have."""
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


class Watchdog:
    """While entered, ends the workers if one of them is silent for too long, and records what each was doing.

    Args:
        run: where the error files go.
        beats: of this node's workers.
        timeout_s: seconds without a step that count as a hang; None: never.
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
            if late := [beat for beat in found if self._is_late(beat)]:
                print(f"{_silence(late[0])}: the workers hang; their stacks go to their logs", flush=True)
                self._end(found)
                self._beats.clear()

    def _is_late(self, beat: Beat) -> bool:
        return beat.age_s > patience_s(self._timeout_s or 0, beat.phase)

    def _await_stacks(self, found: list[Beat], attempt: int, timeout_s: float) -> None:
        """Wait until those that live have written their stacks, and write no more."""
        logs = [self._run.rank_log(attempt, beat.rank) for beat in found if processes.start_time(beat.pid)]
        sizes: list[int] = []

        def are_there() -> bool:
            nonlocal sizes
            before, sizes = sizes, [log.stat().st_size if log.exists() else 0 for log in logs]
            return sizes == before and all(map(_last_stack, logs))

        waiting.wait_until(are_there, timeout_s=timeout_s, heed=lambda: None, every_s=LOOK_S)

    def _end(self, found: list[Beat]) -> None:
        attempt = self._attempt()
        stopped = [beat for beat in found if processes.is_stopped(beat.pid)]
        _signal(found, DUMP_SIGNAL)
        _signal(stopped, signal.SIGCONT)  # by SIGSTOP or a debugger: it writes only when it goes on
        for beat in found:
            _ask_flight_recorder(Path(f"{self._run.nccl_pipe(attempt)}{beat.rank}.pipe"))
        self._await_stacks(stopped, attempt, DUMP_S)
        _signal(stopped, signal.SIGSTOP)  # or it would train on
        time.sleep(DUMP_S)
        self._await_stacks([beat for beat in found if beat not in stopped], attempt, DUMP_S * (DUMP_FACTOR - 1))
        for beat in found:
            stack = _last_stack(self._run.rank_log(attempt, beat.rank))
            top = next((line for line in stack if line.lstrip().startswith("File")), "an unknown place").strip()
            error = {
                "time": time.time(),
                "attempt": attempt,
                "rank": beat.rank,
                "node": self._node_rank,
                "host": node_name(),
                "kind": "hang",
                "waiting": not self._is_late(beat) if beat.phase in TELLING else any(place in top for place in WAITING),
                "type": "hang",
                "message": f"{_silence(beat)} (train.hang_timeout_s); it is in {top}",
                "traceback": "\n".join(stack),
            }
            with contextlib.suppress(OSError):  # a full disk must not keep them alive
                write_json_atomic(self._run.rank_error(attempt, beat.rank), error)
        _signal(found, signal.SIGKILL)


def _silence(beat: Beat) -> str:
    """For how long a worker has been silent, and since when."""
    done = "no step" if beat.phase == TRAINING else f"{beat.phase}, no progress"
    return f"{done} for {beat.age_s:.0f} s"


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


def _last_stack(log: Path) -> list[str]:
    """The main thread's stack in the last dump of a log, innermost call first.

    It is the last of a dump, which begins with the youngest thread. That is not always the "current" one: where the
    process was stopped before, the signal may reach any thread, also one without a stack of Python's.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    blocks = re.findall(r"^(?:Current thread|Thread) 0x[^\n]*\n((?:  [^\n]*\n?)+)", text, re.MULTILINE)
    return blocks[-1].rstrip().splitlines() if blocks else []
