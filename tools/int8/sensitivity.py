"""Which layers of an int8 model cost it most: each is computed in float once, all others as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.tools.int8.graph import Graph

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from onnx import ModelProto

    Array = NDArray[np.float32]
    Run = Callable[[ModelProto], Array]
    """The logits of a model for the calibration images."""


def order(model: ModelProto, quantized: ModelProto, run: Run) -> list[str]:
    """Names of the layers, first the one whose computing in float brings the logits nearest to the float model's.

    Args:
        model: of float32.
        quantized: made of it, by :func:`launcher.tools.int8.qdq.quantize`.
        run: computes a model.
    """
    expected = run(model)
    names = [node.name for node in Graph(model).layers]
    left = {name: float(np.square(run(with_float(quantized, model, name)) - expected).mean()) for name in names}
    return sorted(names, key=left.__getitem__)


def with_float(quantized: ModelProto, model: ModelProto, name: str) -> ModelProto:
    """An int8 model, one of whose layers has its float inputs and weights back."""
    changed = Graph(quantized)
    original = next(node for node in model.graph.node if node.name == name)
    node = next(node for node in changed.nodes if node.name == name)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for place, source in enumerate(original.input):
        if source in constants:
            _put_back(changed.model, constants[source])
            node.input[place] = f"{source}{SUFFIX}"
        else:
            node.input[place] = _before_rounding(changed, node.input[place])
    return changed.model


SUFFIX = "_float"
"""Of the names of constants that were put back."""


def _put_back(model: Any, constant: Any) -> None:
    added = model.graph.initializer.add()
    added.CopyFrom(constant)
    added.name += SUFFIX


def _before_rounding(graph: Graph, name: str) -> str:
    """The tensor that a pair of QuantizeLinear and DequantizeLinear made a tensor of; itself, if none did."""
    maker = graph.producers.get(name)
    rounded = graph.producers.get(maker.input[0]) if maker is not None and maker.op_type == "DequantizeLinear" else None
    return str(rounded.input[0]) if rounded is not None and rounded.op_type == "QuantizeLinear" else name
