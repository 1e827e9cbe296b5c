"""What the nodes of a run did with cores, memory and GPUs, by their files, for the records that trackers send."""

from __future__ import annotations

import statistics
import time as clock
from collections import deque
from typing import TYPE_CHECKING, Any

from launcher.system.lines import Lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from launcher.runs.run_dir import RunDir

MOST_NODES = 16
"""With more, no values of each: mean, least and most over the nodes."""
RARELY_S = 15.0
"""Seconds between two looks at the files of so many."""
SETTLED_S = 5.0
"""A record has the loads up to so many seconds before it: by then they have come over a shared file system, so that
each is sent with the same record whenever the files are read; of more nodes so many and ``RARELY_S``."""


class Loads:
    """Follows the files.

    Args:
        run: whose.
    """

    def __init__(self, run: RunDir) -> None:
        self._pattern = run.node_load("*")
        self._files: dict[str, Lines] = {}
        self._waiting: dict[str, deque[dict[str, Any]]] = {}
        self._looked_at, self._is_old = -RARELY_S, True

    def grow_old(self) -> None:
        """Have the files read again for the next record."""
        self._is_old = True

    def _look(self) -> None:
        now = clock.monotonic()
        if not self._is_old or (len(self._files) > MOST_NODES and now - self._looked_at < RARELY_S):
            return
        self._looked_at, self._is_old = now, False
        for path in sorted(self._pattern.parent.glob(self._pattern.name)):
            lines = self._files.setdefault(path.stem, Lines(path))
            self._waiting.setdefault(path.stem, deque()).extend(lines.new())

    def until(self, time: float) -> dict[str, float]:
        """Means of each node since the last call, as ``node-0/cpu`` and ``node-0/gpu-1/utilization``.

        Args:
            time: of the record that they are sent with, in seconds since 1970.
        """
        self._look()
        found: dict[str, dict[str, float]] = {}
        are_many = len(self._waiting) > MOST_NODES
        settled = time - SETTLED_S - (RARELY_S if are_many else 0.0)
        for node, waiting in self._waiting.items():
            lines = []
            while waiting and float(waiting[0].get("time") or 0.0) <= settled:
                lines.append(dict(_flat(waiting.popleft())))
            if lines:
                found[node] = {name: _mean(line.get(name) for line in lines) for name in lines[-1]}
        if are_many:
            return _over_nodes(found)
        return {f"{node}/{name}": value for node, values in found.items() for name, value in values.items()}


def _flat(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line by name, those of its GPUs too."""
    for name, value in line.items():
        if name == "gpus":
            for gpu in value:
                yield from ((f"gpu-{gpu['gpu']}/{key}", number) for key, number in gpu.items() if key != "gpu")
        elif name != "time" and isinstance(value, int | float):
            yield name, value


def _mean(values: Iterator[float | None]) -> float:
    return round(statistics.fmean(value for value in values if value is not None), 4)


def _over_nodes(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """As ``nodes/cpu_mean``, ``nodes/cpu_min``, ``nodes/cpu_max``; GPUs of all nodes together."""
    of_name: dict[str, list[float]] = {}
    for values in found.values():
        for name, value in values.items():
            gpu, _, key = name.rpartition("/")
            of_name.setdefault(f"gpu_{key}" if gpu else name, []).append(value)
    kinds: dict[str, Callable[[list[float]], float]] = {"mean": statistics.fmean, "min": min, "max": max}
    return {f"nodes/{name}_{kind}": of(values) for name, values in of_name.items() for kind, of in kinds.items()}
