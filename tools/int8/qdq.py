"""Writes an int8 model of a float one and its ranges: uint8 activations, int8 weights per channel, as QDQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.system.cpu import PORTABLE_BITS
from launcher.tools.int8 import activations
from launcher.tools.int8.graph import IMAGES_DIMS, MATRIX_DIMS, Graph, attribute

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

    from launcher.tools.int8.calibration import Ranges

    Array = NDArray[np.float32]


def quantize(
    model: ModelProto,
    ranges: Mapping[str, Ranges],
    *,
    bits: int,
    in_float: Collection[str] = (),
    cuts: bool = False,
) -> ModelProto:
    """The int8 model.

    Args:
        model: of float32, with the shapes of its tensors inferred; it stays as it is.
        ranges: of its tensors.
        bits: of the weights, 7 or 8.
        in_float: names of nodes that are not quantized.
        cuts: whether the rarest extreme values are cut off.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    limits: dict[str, Any] = {name: _limits(each, cuts=cuts) for name, each in ranges.items()}
    for activation in activations.find(Graph(model)):
        if activation.read in limits:
            low, high = limits[activation.read]
            limits[activation.read] = _as_limits(*activation.useful(float(low), float(high)))
    for node in model.graph.node:  # what is folded into its activation has that one's range
        if node.op_type in ("Relu", "Clip") and node.output[0] in limits:
            limits.setdefault(node.input[0], limits[node.output[0]])
    quantizer: Any = QDQQuantizer(  # type: ignore[no-untyped-call]
        Graph(model).model,  # a copy: it is changed in place
        per_channel=True,
        reduce_range=bits == PORTABLE_BITS,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, limits),
        nodes_to_quantize=[],
        nodes_to_exclude=list(in_float),
        op_types_to_quantize=list({*QLinearOpsRegistry, *QDQRegistry}),
        extra_options={},
    )
    quantizer.quantize_model()
    made: ModelProto = quantizer.model.model
    return made


def _limits(ranges: Ranges, *, cuts: bool) -> tuple[Array, Array]:
    return _as_limits(*ranges.percentiles) if cuts else _as_limits(ranges.low.min(), ranges.high.max())


def _as_limits(low: float, high: float) -> tuple[Array, Array]:
    return np.array(low, np.float32), np.array(high, np.float32)


def correct_biases(graph: Graph, ranges: Mapping[str, Ranges], *, bits: int) -> None:
    """Shift each layer's bias by the mean error that rounding its weights makes on the calibration images.

    (Nagel and others, "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019.)
    """
    for node in graph.layers:
        if not graph.has_bias(node) or not graph.owns_constants(node):
            continue
        weight, mean = graph.constant(node.input[1]), ranges[node.input[0]].mean if node.input[0] in ranges else None
        rows = _rows(node, weight)
        if rows is None or mean is None:
            continue
        error = _rounded(rows, bits) - rows
        if node.op_type == "Conv":
            groups = attribute(node, "group", 1)
            if len(mean) != error.shape[1] * groups:
                continue
            error = error.reshape(groups, -1, *error.shape[1:]).sum(axis=(3, 4))  # groups x O/groups x I/groups
            shift = np.einsum("goi,gi->go", error, mean.reshape(groups, -1)).reshape(-1)
        elif len(mean) == error.shape[1]:
            shift = error @ mean
        else:
            continue
        graph.set_constant(node.input[2], (graph.constant(node.input[2]) - shift).astype(np.float32))


def most(bits: int) -> int:
    """The largest magnitude of a weight of so many bits as ONNX Runtime rounds it."""
    return 2 ** (bits - 1) if bits == PORTABLE_BITS else 127


def _rows(node: NodeProto, weight: Array) -> Array | None:
    """A layer's weights with its output channels first; None: of a layer that is left as it is."""
    if node.op_type == "Conv" and weight.ndim == IMAGES_DIMS:
        return weight
    if node.op_type == "Gemm" and weight.ndim == MATRIX_DIMS:
        return weight if attribute(node, "transB", 0) else weight.T
    return None


def _rounded(rows: Array, bits: int) -> Array:
    """Weights as int8 has them, a scale for each output channel."""
    axes = tuple(range(1, rows.ndim))
    scale = np.maximum(np.abs(rows).max(axis=axes, keepdims=True) / most(bits), 1e-12)
    rounded: Array = np.round(rows / scale) * scale
    return rounded
