"""The ways to make an int8 model, the quickest and simplest first; what is measured for one serves the next ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.tools.int8 import calibration, equalize, qat, qdq, sensitivity
from launcher.tools.int8.graph import Graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from onnx import ModelProto

    from launcher.tools.int8.calibration import Ranges

    Array = NDArray[np.float32]
    Train = Callable[[ModelProto, ModelProto], ModelProto]
    """Of a float model and the int8 model made of it: the float model with other weights."""

NUM_IN_FLOAT = (1, 2, 4, 8, 16)
"""Layers that are kept in float, tried one after the other: those that cost most first."""
NUM_SENSITIVITY_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class Made:
    """An int8 model and how it was made."""

    rung: str
    """minmax: ranges as measured; equalized: channels made equally wide, biases corrected; percentile: the same, and
    rare values cut off; N in float: equalized, and the N layers that cost most are not quantized; qat: equalized, and
    trained with rounding."""
    model: ModelProto
    settings: dict[str, Any] = field(default_factory=dict)
    """What the file's metadata add to what all rungs have in common."""


class RungError(Exception):
    """A way failed; what it says is what went wrong there.

    Args:
        rung: its name.
        error: what was raised.
    """

    def __init__(self, rung: str, error: Exception) -> None:
        super().__init__(str(error) or type(error).__name__)
        self.rung = rung


class Rungs:
    """Goes from one way to the next.

    Args:
        model: of float32, BatchNorm folded into its layers, the shapes of its tensors inferred.
        batches: calibration images, float32 N x 3 x S x S.
        bits: of the weights, 7 or 8.
        threads: of the CPU.
        train: for the last way; None: there is no training.
    """

    def __init__(
        self, model: ModelProto, batches: Sequence[Array], *, bits: int, threads: int, train: Train | None = None
    ) -> None:
        self._model = model
        self._batches = batches
        self._bits = bits
        self._threads = threads
        self._train = train

    def __iter__(self) -> Iterator[Made]:
        """Each is made when it is asked for."""
        yield Made(rung="minmax", model=self._quantize(self._model, self._ranges))
        equal, ranges = self._equalized
        whole = self._quantize(equal, ranges)
        yield Made(rung="equalized", model=whole)
        yield Made(rung="percentile", model=self._quantize(equal, ranges, cuts=True))
        names = sensitivity.order(equal, whole, self._run)
        for num in NUM_IN_FLOAT:
            chosen = names[:num]
            if num <= len(names):
                model = self._quantize(equal, ranges, in_float=chosen)
                yield Made(rung=f"{num} in float", model=model, settings={"float_layers": chosen})
        if self._train is not None:
            try:
                trained = self._train(equal, whole)
            except Exception as error:
                raise RungError(qat.RUNG, error) from error
            yield Made(rung=qat.RUNG, model=self._quantize(trained, ranges))

    @cached_property
    def _ranges(self) -> dict[str, Ranges]:
        return calibration.measure(self._model, self._batches, threads=self._threads)

    @cached_property
    def _equalized(self) -> tuple[ModelProto, dict[str, Ranges]]:
        graph = Graph(self._model)
        ranges = equalize.equalize(graph, self._ranges)
        qdq.correct_biases(graph, ranges, bits=self._bits)
        return graph.model, ranges

    def _quantize(self, model: ModelProto, ranges: dict[str, Ranges], **options: Any) -> ModelProto:
        return qdq.quantize(model, ranges, bits=self._bits, **options)

    def _run(self, model: Any) -> Array:
        """The logits of a model for some of the calibration images."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        images = np.concatenate(self._batches)[:NUM_SENSITIVITY_IMAGES]
        return np.asarray(session.run(["logits"], {"images": images})[0])
