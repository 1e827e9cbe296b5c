"""How fast nodes add up tensors, within and between them: which of them are slow, in words."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from launcher.node.all_reduce_round import Groups

SLOW = 0.6
"""A node or a link is slow where it reaches less than this part of the median."""
FABRIC_SLOW = 0.3
"""Between nodes even one worker reaches this part of what one port of InfiniBand can carry; TCP beside it does not."""
PAIR = 2


@dataclass(kw_only=True)
class Speeds:
    """What was measured, in GB/s (bus bandwidth, as nccl-tests counts it)."""

    within: list[float | None]
    """Between the workers of each node; None: it has only one."""
    links: dict[tuple[int, int], float] = field(default_factory=dict)
    """Between neighbours."""

    def of_node(self, node: int) -> list[float]:
        """The links of a node."""
        return [speed for pair, speed in self.links.items() if node in pair]

    def between(self, node: int) -> float | None:
        """The slowest link of a node; None: it has none."""
        return min(self.of_node(node), default=None)


def rounds_of_pairs(num: int) -> list[Groups]:
    """Rounds in which each of some nodes in a ring meets both of its neighbours, one at a time."""
    ring = [[node, (node + 1) % num] for node in range(num if num > PAIR else num - 1)]
    even, odd = ring[0 : num - 1 : 2], ring[1 : num - 1 : 2]
    last = ring[num - 1 :]
    if num % 2 == 0:  # the last and the first are free while the odd ones meet
        return [even, [*odd, *last]] if num > PAIR else [even]
    return [part for part in (even, odd, last) if part]


def find_slow(speeds: Speeds, hosts: Sequence[str], fabrics: Sequence[float]) -> dict[int, str]:
    """Which nodes are slow or have a slow link, in words, by node rank.

    Args:
        speeds: as measured.
        hosts: names of the nodes.
        fabrics: of each node, see :func:`fabric_gb_s`.
    """
    found: dict[int, list[str]] = {}
    within = {node: speed for node, speed in enumerate(speeds.within) if speed is not None}
    middle = _median(within.values())
    for node, speed in within.items():
        if speed < SLOW * middle:
            text = f"{speed:.1f} GB/s between its own workers; the median of the nodes is {middle:.1f}"
            found.setdefault(node, []).append(text)
    # Of each node the better link: those to a slow one are slow for its neighbours, too.
    best = {node: max(links) for node in range(len(hosts)) if (links := speeds.of_node(node))}
    middle = _median(best.values())
    for pair, speed in speeds.links.items():
        blamed = [node for node in pair if best[node] < SLOW * middle and len(hosts) > PAIR] or [pair[0]]
        for node in blamed if speed < SLOW * middle else ():
            other = pair[0] if node == pair[1] else pair[1]
            text = f"{speed:.1f} GB/s to {hosts[other]}; the median of the nodes is {middle:.1f}"
            found.setdefault(node, []).append(text)
    for node, fabric in enumerate(fabrics):
        between = speeds.between(node)
        if fabric and between is not None and between < FABRIC_SLOW * fabric:
            found.setdefault(node, []).append(
                f"{between:.1f} GB/s to other nodes, though a port of its InfiniBand can carry {fabric:.0f}: with "
                "NCCL_DEBUG=INFO NCCL says whether it goes by NET/IB or NET/Socket, and why"
            )
    return {node: "; ".join(texts) for node, texts in sorted(found.items())}


def _median(values: Iterable[float]) -> float:
    return statistics.median_high(list(values) or [0.0])


def summary(speeds: Speeds, hosts: Sequence[str], slow: Mapping[int, str]) -> list[str]:
    """What a user is told of a check: the speeds, and what is slow."""
    within = [speed for speed in speeds.within if speed is not None]
    told = []
    if within:
        told.append(f"within a node {_range(within)} GB/s")
    if speeds.links:
        told.append(f"between nodes {_range(list(speeds.links.values()))} GB/s")
    lines = [f"check of the nodes: {', '.join(told)} (all-reduce, bus bandwidth)"] if told else []
    return lines + [f"warning: slow: {hosts[node]}: {text}" for node, text in slow.items()]


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.1f}", f"{max(values):.1f}"
    return least if least == most else f"{least} to {most}"


def fabric_gb_s(root: Path = Path("/")) -> float:
    """GB/s that the fastest port of this node's InfiniBand (or RoCE) can carry, as its driver says; 0: it has none.

    Args:
        root: where /sys is; another one in tests.
    """
    rates = [0.0]
    for port in (root / "sys/class/infiniband").glob("*/ports/*"):
        try:
            state, rate = ((port / name).read_text(encoding="ascii") for name in ("state", "rate"))
        except OSError:
            continue
        if "ACTIVE" in state and rate.split():
            rates.append(float(rate.split()[0]) / 8)  # "200 Gb/sec (4X HDR)"
    return max(rates)
