"""What a run directory has for those who track the run: its records, in their order, and what became of the run."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.recipe import metrics as recipe_metrics
from launcher.system.lines import Lines
from launcher.tracking.loads import Loads

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir

FACTS = "facts"
"""Kind of the event with what was found out at the start: images, classes, parameters, device, versions."""
NOT_SENT = {"time", "attempt", "samples", "offset", "epoch", "step"}
"""Numbers of a line that are no measurement."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of metrics.jsonl that counts."""

    number: int
    """Among them, from 0: the same whenever the file is read."""
    time: float
    """When it was written: seconds since 1970."""
    split: str
    """train, val or test."""
    epoch: int
    """From 1, as people count."""
    step: int
    """Optimizer steps taken; grows within a split, of test within each test set."""
    values: dict[str, float]
    """Numbers by name, as in ``train/loss`` or ``train/lr/head``; and what the nodes did since the record before."""
    line: dict[str, Any]
    """All of it."""
    is_first: bool
    """Whether it is the first of its split."""
    is_best: bool
    """Whether no validation before it was better."""
    validation: dict[str, Any]
    """What validation.json says, where it is of this validation; else empty: it keeps only that of the best."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """A run at this moment."""

    state: str
    """As in status.json."""
    best: dict[str, Any] | None
    """As in status.json."""
    attempts: int
    """Starts of the workers so far."""
    message: str
    """What ended the last attempt that did not end well."""
    facts: dict[str, Any]
    """What the start found out; empty: it is not known yet."""


class Feed:
    """Reads a run's files as they grow.

    After a resume from an earlier checkpoint some steps come a second time. The first line of each counts, so that what
    is sent while the run goes on is what is sent of it afterwards.

    Args:
        run: its directory.
        recipe: the run's.
    """

    def __init__(self, run: RunDir, recipe: Recipe) -> None:
        self._run = run
        self._metrics, self._events, self._loads = Lines(run.metrics), Lines(run.events), Loads(run)
        self._reached: dict[str, int] = {}
        watched = recipe.train.early_stopping
        self._watched, self._least = watched.metric, watched.mode == "min"
        self._best: float | None = None
        self._hidden: set[str] = set()
        self._attempts, self._message = 0, ""
        self._facts: dict[str, Any] = {}
        self._kept_validation: dict[str, Any] = {}
        self.count = 0
        """Records so far."""

    def new(self, *, final: bool = False) -> list[Record]:
        """The records since the last time.

        Args:
            final: whether nobody writes any more.
        """
        for event in self._events.new():
            self._take_event(event)
        self._loads.grow_old()
        return [record for line in self._metrics.new(final=final) if (record := self._record(line))]

    def story(self) -> Story:
        """The run, as of the last look."""
        status = self._run.read_status()
        return Story(
            state=status["state"],
            best=status.get("best"),
            attempts=self._attempts,
            message=self._message,
            facts=self._facts,
        )

    def _take_event(self, event: dict[str, Any]) -> None:
        kind = event.get("kind")
        if kind == "attempt_started":
            self._attempts = max(self._attempts, event.get("attempt", 0))
        elif kind == "attempt_ended":
            self._message = str(event.get("message") or event.get("cause") or "")
        elif kind == FACTS:
            self._facts = {name: value for name, value in event.items() if name not in ("time", "kind", "rank")}
            self._hidden = recipe_metrics.trivial(int(event.get("num_classes") or 0))

    def _record(self, line: dict[str, Any]) -> Record | None:
        split, epoch, step = line.get("split"), line.get("epoch"), line.get("step")
        if not isinstance(split, str) or not isinstance(step, int) or not isinstance(epoch, int):
            return None
        measured = f"{split} {line.get('test_set')}"  # two test sets may be measured by the same checkpoint
        before = self._reached.get(measured)
        if before is not None and step <= before:
            return None
        self._reached[measured] = step
        self.count += 1
        hidden = NOT_SENT | self._hidden | recipe_metrics.trivial_in(line)
        values = {
            f"{split}/{name}": value
            for name, value in line.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name not in hidden
        }
        time = float(line.get("time") or 0.0)
        return Record(
            number=self.count - 1,
            time=time,
            split=split,
            epoch=epoch + 1,
            step=step,
            values=values | self._loads.until(time),
            line=line,
            is_first=before is None,
            is_best=self._is_best(split, line),
            validation=self._validation(step) if split == "val" else {},
        )

    def _validation(self, step: int) -> dict[str, Any]:
        found = self._kept_validation
        if found.get("step") != step:  # it is written before its line
            with contextlib.suppress(OSError, ValueError):
                found = self._kept_validation = json.loads(self._run.validation.read_text(encoding="utf-8"))
        return found if found.get("step") == step else {}

    def _is_best(self, split: str, line: dict[str, Any]) -> bool:
        value = line.get(self._watched.partition("/")[2])
        if split != "val" or not isinstance(value, int | float):
            return split == "val" and not self._watched.startswith("val/")
        better = self._best is None or (value < self._best if self._least else value > self._best)
        self._best = value if better else self._best
        return better
