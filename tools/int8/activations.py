"""Smooth activations (SiLU, hard-swish, sigmoids): which values of what they read make a difference after them.

A ReLU is folded into its layer, whose output then has the ReLU's range. A smooth activation is not: the layer's output
is rounded for itself, and much of its range may be values that the activation makes nearly 0. Those are cut off, so
that the others get finer steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from launcher.tools.int8.graph import attribute

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from onnx import NodeProto

    from launcher.tools.int8.graph import Graph

    Array = NDArray[np.float64]
    Function = Callable[[Array], Array]

NUM_POINTS = 4096
"""Values between the ends of a range at which an activation is computed."""
MOST = 1 / 255 / 16
"""Of an activation's output, the part by which a value may change that is cut off: a sixteenth of a step of uint8."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A smooth activation of a graph."""

    read: str
    """The tensor that it computes from, and that nothing else reads."""
    nodes: tuple[str, ...]
    """Names of the nodes that compute it."""
    function: Function

    def useful(self, low: float, high: float) -> tuple[float, float]:
        """A part of a range: what lies outside, and is cut off, changes the output by hardly anything."""
        points = np.linspace(low, high, NUM_POINTS)
        values = self.function(points)
        most = np.ptp(values) * MOST
        first, last = _end_of_flat(values, most), NUM_POINTS - 1 - _end_of_flat(values[::-1], most)
        return (float(points[first]), float(points[last])) if first < last else (low, high)


def find(graph: Graph) -> list[Activation]:
    """The smooth activations of a graph."""
    found = []
    for node in graph.nodes:
        function = _function(node)
        if function is None or node.input[0] in graph.outputs:
            continue
        read, made = node.input[0], node.output[0]
        others = [reader for reader in graph.consumers[read] if reader.output[0] != made]
        if not others:
            found.append(Activation(read=read, nodes=(node.name,), function=function))
        elif len(others) == 1 and _multiplies(others[0], read, made) and len(graph.consumers[made]) == 1:
            names = (node.name, others[0].name)
            found.append(Activation(read=read, nodes=names, function=_times_itself(function)))
    return found


def _function(node: NodeProto) -> Function | None:
    """What a node computes of each value; None: it is no smooth activation."""
    if node.op_type == "Sigmoid":
        return lambda x: 1 / (1 + np.exp(-x))
    if node.op_type == "HardSwish":
        return _times_itself(_hard_sigmoid(1 / 6, 0.5))
    if node.op_type == "HardSigmoid":
        return _hard_sigmoid(attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5))
    return None


def _hard_sigmoid(alpha: float, beta: float) -> Function:
    return lambda x: np.clip(alpha * x + beta, 0, 1)


def _times_itself(function: Function) -> Function:
    return lambda x: x * function(x)


def _multiplies(node: NodeProto, first: str, second: str) -> bool:
    return node.op_type == "Mul" and set(node.input) == {first, second}


def _end_of_flat(values: Array, most: float) -> int:
    """Index of the last value up to which all are the same, but for ``most``."""
    spread = np.maximum.accumulate(values) - np.minimum.accumulate(values)
    return int(np.flatnonzero(spread <= most)[-1])
