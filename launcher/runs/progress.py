"""How far a run is, read from its files as they grow: what `launch watch` shows, here or on a login node."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.runs import whereabouts
from launcher.system.lines import Lines

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir

MOST_POINTS = 512
"""Points of a curve that are kept; with more, every other one is dropped. A terminal shows no more."""
PACE_LINES = 20
"""Lines of training from which the time of a step is taken."""


class Curve:
    """A series of values, thinned out as it grows."""

    def __init__(self) -> None:
        self._every = 1
        self._seen = 0
        self.values: list[float] = []

    def add(self, value: float) -> None:
        """Take the next value."""
        if self._seen % self._every == 0:
            self.values.append(value)
        self._seen += 1
        if len(self.values) > MOST_POINTS:
            self.values, self._every = self.values[::2], 2 * self._every


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at one moment."""

    run: str
    """Its folder."""
    state: str
    """As in status.json."""
    attempt: int | None = None
    """Which start of the workers this is."""
    epoch: int | None = None
    """That it is in, or the last; from 1."""
    epochs: int | None = None
    """In the whole training."""
    step: int | None = None
    """Optimizer steps taken."""
    num_steps: int | None = None
    """In the whole training."""
    seconds_left: float | None = None
    """Of training, by the last steps and what lay between them; None: unknown, or nothing is left."""
    best: dict[str, Any] | None = None
    """As in status.json."""
    metric: str = ""
    """Of validation, by which it is best."""
    train: dict[str, float] = field(default_factory=dict)
    """The last line of training in metrics.jsonl: numbers by name."""
    val: dict[str, float] = field(default_factory=dict)
    """Likewise of validation."""
    losses: list[float] = field(default_factory=list)
    """Of training, thinned out."""
    metrics: list[float] = field(default_factory=list)
    """Of validation: the metric's values."""
    nodes: int | None = None
    """That train now, where that changes."""
    last_event: dict[str, Any] | None = None
    """The last line of events.jsonl."""
    slowest: dict[str, Any] | None = None
    """The rank that the others wait for: ``{rank, cause, behind}``; None: none is clearly slower."""
    updated: float | None = None
    """When it was last heard of: seconds since 1970."""

    @property
    def part(self) -> float | None:
        """Of the training that is done, from 0 to 1."""
        return min(1.0, self.step / self.num_steps) if self.num_steps and self.step is not None else None

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"part": self.part}


class Progress:
    """Follows a run; what was read is not read again.

    Args:
        run: its directory.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._metrics, self._events = Lines(run.metrics), Lines(run.events)
        self._losses = Curve()
        self._of_val: dict[str, Curve] = {}
        self._train: dict[str, Any] = {}
        self._val: dict[str, Any] = {}
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_LINES)
        self._last_event: dict[str, Any] | None = None
        self._metric = ""

    def look(self) -> Snapshot:
        """The run now."""
        status = self._run.read_status()
        best = status.get("best")
        self._metric = best["metric"] if best else self._metric
        for line in self._metrics.new():
            self._take(line)
        for event in self._events.new():
            self._last_event = event
        step, num_steps, epochs = status.get("step"), status.get("num_steps"), status.get("epochs")
        times = [status.get("updated"), self._train.get("time"), (self._last_event or {}).get("time")]
        if self._train.get("step", -1) > (step or 0):
            step = self._train["step"]
        return Snapshot(
            run=str(self._run),
            state=status["state"],
            attempt=status.get("attempt"),
            epoch=whereabouts.epoch_shown(status),
            epochs=epochs,
            step=step,
            num_steps=num_steps,
            seconds_left=self._seconds_left(step, num_steps) if status["state"] == "running" else None,
            best=best,
            metric=self._metric,
            train=_numbers(self._train),
            val=_numbers(self._val),
            losses=list(self._losses.values),
            metrics=list(curve.values) if (curve := self._of_val.get(self._metric.removeprefix("val/"))) else [],
            nodes=status.get("nodes"),
            last_event=self._last_event,
            slowest=self._slowest(status) if status["state"] == "running" else None,
            updated=max((moment for moment in times if moment is not None), default=None),
        )

    def _slowest(self, status: dict[str, Any]) -> dict[str, Any] | None:
        try:
            times = json.loads(self._run.rank_times.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet
            return None
        slowest = times["slowest"]
        is_of_now = times["attempt"] == status.get("attempt")
        return {key: slowest[key] for key in ("rank", "cause", "behind")} if slowest["is_slow"] and is_of_now else None

    def _take(self, line: dict[str, Any]) -> None:
        if line.get("split") == "train":
            if self._pace and line["step"] <= self._pace[-1][0]:
                self._pace.clear()  # it went back to a checkpoint
            self._pace.append((line["step"], line["time"]))
            self._train = line
            if isinstance(line.get("loss"), float):
                self._losses.add(line["loss"])
        elif line.get("split") == "val":
            self._val = line
            for name, value in line.items():
                if isinstance(value, float):
                    self._of_val.setdefault(name, Curve()).add(value)

    def _seconds_left(self, step: int | None, num_steps: int | None) -> float | None:
        if step is None or not num_steps or len(self._pace) < 2:  # noqa: PLR2004  two lines have a time between them
            return None
        (first, began), (last, ended) = self._pace[0], self._pace[-1]
        passed = time.time() - ended
        return max(0.0, (num_steps - last) * (ended - began) / (last - first) - passed)


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if isinstance(value, int | float)}
