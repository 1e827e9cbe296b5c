"""Measures, once, between which values each tensor of a model lies for the calibration images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.tools.int8.graph import IMAGES_DIMS, MATRIX_DIMS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from onnx import ModelProto

    Array = NDArray[np.float32]

SAMPLES_A_BATCH = 4096
"""Values of each tensor that are kept of a batch: enough for a percentile, and little memory."""
WITH_CHANNELS = (MATRIX_DIMS, IMAGES_DIMS)
"""Dimensions of tensors whose second one is that of channels."""
PERCENTILE = 99.99
"""Of the values of a tensor, those beyond which are cut off on either side."""


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Of one tensor, by channel where it has two or four dimensions; else of all of it, as one channel."""

    low: Array
    high: Array
    mean: Array
    percentiles: tuple[float, float]
    """Of the whole tensor, at 100 - PERCENTILE and PERCENTILE."""

    def scaled(self, factors: Array) -> Ranges:
        """The same where each channel is multiplied by a positive factor; nothing of it is cut off then."""
        if len(self.low) != len(factors):
            return self
        return Ranges(
            low=self.low * factors,
            high=self.high * factors,
            mean=self.mean * factors,
            percentiles=(float((self.low * factors).min()), float((self.high * factors).max())),
        )


def measure(model: ModelProto, batches: Iterable[Array], *, threads: int) -> dict[str, Ranges]:
    """The ranges of the images and of every float tensor that may be quantized.

    Args:
        model: with the shapes of its tensors inferred.
        batches: of images, float32 N x 3 x S x S.
        threads: of the CPU.
    """
    import onnxruntime
    from onnx import ModelProto as Model
    from onnx import TensorProto

    augmented: Any = Model()
    augmented.CopyFrom(model)
    known = {output.name for output in augmented.graph.output}
    wanted = _wanted(model) - known
    for info in model.graph.value_info:
        if info.name in wanted and info.type.tensor_type.elem_type == TensorProto.FLOAT:
            augmented.graph.output.append(info)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(augmented.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    image_name = session.get_inputs()[0].name
    collected: dict[str, _Collector] = {name: _Collector() for name in [image_name, *names]}
    for images in batches:
        for name, value in zip([image_name, *names], [images, *session.run(names, {image_name: images})], strict=True):
            collected[name].add(np.asarray(value))
    return {name: each.ranges() for name, each in collected.items()}


def _wanted(model: ModelProto) -> set[str]:
    """What nodes make, but for what is folded into the activation that alone reads it."""
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    made = {name for node in model.graph.node for name in node.output}
    return {name for name in made if readers.get(name) not in (["Relu"], ["Clip"])}


class _Collector:
    """Adds up one tensor's values."""

    def __init__(self) -> None:
        self._low: list[Array] = []
        self._high: list[Array] = []
        self._mean: list[Array] = []
        self._samples: list[Array] = []

    def add(self, value: Array) -> None:
        flat = value.reshape(*value.shape[:2], -1) if value.ndim in WITH_CHANNELS else value.reshape(1, 1, -1)
        self._low.append(flat.min(axis=2).min(axis=0))
        self._high.append(flat.max(axis=2).max(axis=0))
        self._mean.append(flat.mean(axis=2).mean(axis=0))
        self._samples.append(value.reshape(-1)[:: max(1, value.size // SAMPLES_A_BATCH)].copy())

    def ranges(self) -> Ranges:
        low, high = np.percentile(np.concatenate(self._samples), [100 - PERCENTILE, PERCENTILE])
        return Ranges(
            low=np.min(self._low, axis=0),
            high=np.max(self._high, axis=0),
            mean=np.mean(self._mean, axis=0),
            percentiles=(float(low), float(high)),
        )
