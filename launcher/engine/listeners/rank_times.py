"""What each rank does with its time, and which one holds the others up.

A step takes as long as its slowest rank: the others wait for it where gradients are exchanged. So a rank's own part of
a step is what it computes, up to its last gradient, and what it waits for images; the rest it waits for its peers.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.engine.device import Device
    from launcher.engine.listeners.recorder import Recorder

CLEARLY = 0.2
"""A rank is slow whose part of a step takes so much longer than the median rank's: a fifth of all others' time is lost.
Ranks on equal devices differ by a few percent."""
LEAST_S = 0.002
"""But by so many seconds a step at least: of shorter steps the clock and the scheduler make more."""
IN_A_ROW = 3
"""Windows in which the same rank must be slow before it is named: one may be a hiccup."""
MOST_STEPS = 1000
"""Of a window whose times are kept: a long one is known well enough by its last steps."""
UNITS = 1e-9
"""Times are exchanged as whole nanoseconds."""


@dataclass(frozen=True, kw_only=True)
class Slowest:
    """The rank that the others wait for most."""

    rank: int
    behind: float
    """By which fraction its part of a step takes longer than that of the median rank."""
    cause: str
    """What takes longer there: its ``loader`` or its ``device``."""
    is_slow: bool
    """Whether it is clearly slower."""


def find_slowest(compute_s: Sequence[float], wait_s: Sequence[float]) -> Slowest:
    """Of the seconds a step that each rank computes and waits for images."""
    parts = [compute + wait for compute, wait in zip(compute_s, wait_s, strict=True)]
    rank = max(range(len(parts)), key=parts.__getitem__)
    usual = statistics.median_low(parts)  # of two ranks the quicker
    by_loader = wait_s[rank] - statistics.median_low(wait_s)
    by_device = compute_s[rank] - statistics.median_low(compute_s)
    late = parts[rank] - usual
    return Slowest(
        rank=rank,
        behind=late / max(usual, UNITS),
        cause="loader" if by_loader > by_device else "device",
        is_slow=len(parts) > 1 and late > CLEARLY * usual and late > LEAST_S,
    )


class RankTimes:
    """Clocks of this rank, and on rank 0 what those of all ranks say.

    The ranks' times go to rank 0 once a window, in an exchange on the host that is begun at the end of one window and
    looked at at the end of the next, so no step waits for it. The device is asked when it was done with a step only
    after it was.

    Args:
        device: where this rank computes.
        recorder: on rank 0.
        group: of all ranks, on the host.
    """

    def __init__(self, device: Device, recorder: Recorder | None, group: Any) -> None:
        self._device = device
        self._recorder = recorder
        self._group = group
        self._open: deque[tuple[Any, Any, float]] = deque(maxlen=MOST_STEPS)
        """Steps that were begun, the last ones: begin, last gradient, seconds waited for images."""
        self._computed: list[float] = []
        self._pending: tuple[dict[str, int], torch.Tensor, Any] | None = None
        self._row: tuple[int, int] = (-1, 0)
        """A rank that was slow, and in how many windows in a row."""
        self._told: set[tuple[int, str]] = set()

    def step(self, began: Any, last_gradient: Any, waited_s: float) -> None:
        """A step was taken.

        Args:
            began: the device's stamp before its first forward pass.
            last_gradient: that when its last gradient was there; None: it was left out.
            waited_s: for images, between these.
        """
        if last_gradient is not None:
            self._open.append((began, last_gradient, waited_s))

    def end_window(self, position: dict[str, int], *, step_s: float, wait_s: float) -> dict[str, float]:
        """Begin to tell rank 0 of a window. Every rank must call it.

        Args:
            position: epoch and step at its end.
            step_s: seconds of a step, in the mean.
            wait_s: of these, those that this rank waited for images.

        Returns:
            On rank 0 what the last line of a window's log says of the ranks, which is of the window before it.
        """
        found = self.collect()
        while self._open and (seconds := self._device.seconds_between(*self._open[0][:2])) is not None:
            self._computed.append(max(0.0, seconds - self._open.popleft()[2]))
        compute_s = statistics.fmean(self._computed) if self._computed else 0.0
        self._computed = []
        world, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        own = torch.zeros(world, 3, dtype=torch.int64)
        for column, seconds in enumerate((step_s, compute_s, wait_s)):
            own[rank, column].fill_(int(seconds / UNITS))
        work = dist.all_reduce(own, group=self._group, async_op=True)
        self._pending = (position, own, work)
        return found

    def collect(self) -> dict[str, float]:
        """Take what the ranks told last; at the end of training, too."""
        if self._pending is None:
            return {}
        position, times, work = self._pending
        self._pending = None
        work.wait()
        if self._recorder is None or len(times) == 1:
            return {}
        step_s, compute_s, wait_s = ([nanoseconds * UNITS for nanoseconds in row] for row in times.T.tolist())
        slowest = find_slowest(compute_s, wait_s)
        before = self._row[1] if self._row[0] == slowest.rank else 0
        self._row = (slowest.rank, before + 1) if slowest.is_slow else (-1, 0)
        named = self._row[1] >= IN_A_ROW
        told = {"rank": slowest.rank, "cause": slowest.cause, "behind": round(slowest.behind, 4), "is_slow": named}
        each = {"step_s": step_s, "compute_s": compute_s, "wait_s": wait_s}
        rounded = {name: [round(value, 6) for value in values] for name, values in each.items()}
        self._recorder.ranks({**position, "slowest": told, **rounded})
        if named and (slowest.rank, slowest.cause) not in self._told:
            self._told.add((slowest.rank, slowest.cause))
            self._tell(position, slowest)
        return {"slowest_rank": slowest.rank, "slowest_behind": round(slowest.behind, 4)}

    def _tell(self, position: dict[str, int], slowest: Slowest) -> None:
        assert self._recorder  # noqa: S101  on rank 0
        cure = (
            "its images come late: look at its disk, its share of cores and data.workers"
            if slowest.cause == "loader"
            else "its device computes more slowly: look for another process on it, its clock and its temperature"
        )
        message = (
            f"rank {slowest.rank} is slower than the others, who wait for it: its part of a step takes "
            f"{slowest.behind:.0%} longer than the median rank's, by its {slowest.cause}; {cure}"
        )
        fields = {"straggler": slowest.rank, "cause": slowest.cause, "behind": round(slowest.behind, 4)}
        self._recorder.event("straggler", **position, **fields, message=message)
        self._recorder.say(f"step {position['step']}: {message}")
