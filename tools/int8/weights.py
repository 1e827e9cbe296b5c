"""Keeps weights alone as int8; they become float32 when the file is opened, and compute as before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from launcher.tools.int8.graph import Graph, attribute

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

BITS = 8
"""All of them on every CPU: no products of integers are added up."""


def compress(model: ModelProto) -> ModelProto:
    """The model with the weights of its layers as int8 and a scale for each output channel."""
    from onnx import TensorProto, helper

    graph = Graph(model)
    nodes, done = [], set()
    for layer in graph.layers:
        name = layer.input[1]
        if name in done:
            continue
        done.add(name)
        weight = graph.constant(name)
        axis = output_channels(layer, weight.ndim)
        others = tuple(each for each in range(weight.ndim) if each != axis)
        scale = np.maximum(np.abs(weight).max(axis=others, keepdims=True) / 127, 1e-12).astype(np.float32)
        constants = [f"{name}_int8", f"{name}_scale"]
        graph.replace_constant(
            name, dict(zip(constants, (np.round(weight / scale).astype(np.int8), scale), strict=True))
        )
        # not DequantizeLinear, which ONNX Runtime would compute anew for each batch
        nodes.append(helper.make_node("Cast", constants[:1], [f"{name}_steps"], f"{name}_cast", to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{name}_steps", constants[1]], [name], f"{name}_times"))
    nodes += graph.nodes
    del graph.model.graph.node[:]
    graph.model.graph.node.extend(nodes)
    return graph.model


def output_channels(layer: NodeProto, dims: int) -> int:
    """The dimension of a layer's weights that is that of its output channels."""
    is_first = layer.op_type == "Conv" or (layer.op_type == "Gemm" and attribute(layer, "transB", 0))
    return 0 if is_first else dims - 1
