"""Makes a model easier to quantize without changing what it computes, as long as values stay in the measured ranges.

Channels of one tensor share one scale in int8; where one channel reaches 6 and another 0.1, nothing is left of the
second. What a depthwise convolution reads can have all channels equally wide at no cost: each is multiplied by a factor
where it is made and divided by it in that convolution's weights, which have a scale for each channel anyway (after
Nagel and others, "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from launcher.tools.int8.graph import IMAGES_DIMS, Graph, attribute

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from onnx import NodeProto

    from launcher.tools.int8.calibration import Ranges

    Array = NDArray[np.float32]

MAX_FACTOR = 64.0
"""A channel that is nearly always 0 is not blown up beyond this: other images may show more of it."""


def equalize(graph: Graph, ranges: Mapping[str, Ranges]) -> dict[str, Ranges]:
    """Change a model's constants; return the ranges of its tensors then."""
    found = dict(ranges)
    for reader in graph.layers:
        read = reader.input[0]
        if not _is_depthwise(graph, reader) or read not in found:
            continue
        maker, most = _maker(graph, read)
        if maker is None:
            continue
        widest = np.maximum(-found[read].low, found[read].high)
        if widest.max() <= 0:
            continue
        factors = (widest.max() / np.maximum(widest, widest.max() / MAX_FACTOR)).astype(np.float32)
        if most is not None:  # a channel must not be clipped that was not
            factors = np.minimum(factors, np.maximum(most / np.maximum(widest, 1e-12), 1)).astype(np.float32)
        _scale(graph, maker, factors)
        graph.set_constant(reader.input[1], graph.constant(reader.input[1]) / factors[:, None, None, None])
        for name in {read, maker.output[0]} & found.keys():
            found[name] = found[name].scaled(factors)
    return found


def _maker(graph: Graph, name: str) -> tuple[NodeProto | None, float | None]:
    """The convolution whose output a tensor is, perhaps after ReLU or a clip from 0, and the most that this leaves."""
    most = None
    node = _only_for(graph, name)
    if node is not None and node.op_type == "Clip":
        limits = [graph.constant(limit).item() for limit in node.input[1:] if graph.is_constant(limit)]
        if not limits or limits[0] != 0:
            return None, None
        most = limits[-1]
    if node is not None and node.op_type in ("Clip", "Relu"):
        node = _only_for(graph, node.input[0])
    is_ours = node is not None and node.op_type == "Conv" and graph.owns_constants(node)
    return (node, most) if is_ours else (None, None)


def _only_for(graph: Graph, name: str) -> NodeProto | None:
    """The node that makes a tensor which one node alone reads."""
    is_shared = name in graph.outputs or len(graph.consumers.get(name, [])) != 1
    return None if is_shared else graph.producers.get(name)


def _is_depthwise(graph: Graph, node: NodeProto) -> bool:
    if node.op_type != "Conv" or not graph.owns_constants(node):
        return False
    shape = graph.constant(node.input[1]).shape
    return len(shape) == IMAGES_DIMS and shape[1] == 1 and attribute(node, "group", 1) == shape[0]


def _scale(graph: Graph, node: NodeProto, factors: Array) -> None:
    graph.set_constant(node.input[1], graph.constant(node.input[1]) * factors[:, None, None, None])
    if graph.has_bias(node):
        graph.set_constant(node.input[2], graph.constant(node.input[2]) * factors)
