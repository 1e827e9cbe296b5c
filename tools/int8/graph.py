"""An ONNX graph in memory: its constants as arrays, who makes a tensor and who reads it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from onnx import helper, numpy_helper

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

    Array = NDArray[np.float32]

LAYERS = ("Conv", "Gemm", "MatMul")
IMAGES_DIMS, MATRIX_DIMS = 4, 2
"""Dimensions of the weights of a convolution over images, and of a product."""


class Graph:
    """Reads and changes a model.

    Args:
        model: which is copied.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model: ModelProto = copy.deepcopy(model)
        self._constants: dict[str, Any] = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.outputs = {output.name for output in self.model.graph.output}

    @property
    def nodes(self) -> Any:
        """In the order in which they are computed."""
        return self.model.graph.node

    @property
    def layers(self) -> list[NodeProto]:
        """Convolutions and products with constant weights."""
        return [node for node in self.nodes if node.op_type in LAYERS and self.is_constant(node.input[1])]

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is a constant."""
        return name in self._constants

    def owns_constants(self, node: NodeProto) -> bool:
        """Whether a layer's weights and bias are constants of it alone."""
        return all(self.is_constant(name) and len(self.consumers[name]) == 1 for name in node.input[1:])

    def has_bias(self, node: NodeProto) -> bool:
        """Whether a layer adds a bias."""
        _images, _weight, *bias = node.input
        return bool(bias)

    def constant(self, name: str) -> Array:
        """A constant's value."""
        found: Array = numpy_helper.to_array(self._constants[name])
        return found

    def set_constant(self, name: str, value: Array) -> None:
        """Change a constant."""
        self._constants[name].CopyFrom(numpy_helper.from_array(value, name))

    def replace_constant(self, name: str, values: dict[str, NDArray[Any]]) -> None:
        """Put other constants, by name, in the place of one."""
        self.model.graph.initializer.remove(self._constants.pop(name))
        self.model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in values.items())


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """A node's attribute; the default where it has none."""
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)
