"""Computes an ONNX graph by torch, so that its constants can learn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from onnx import helper
from torch.nn import functional

from launcher.tools.int8.graph import Graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from onnx import ModelProto, NodeProto
    from torch import Tensor

    Attributes = dict[str, Any]
    Change = Callable[[str, Tensor], Tensor]
    """Of a tensor's name and value: the value that is read instead."""


class TorchGraph:
    """A graph whose nodes torch computes.

    Args:
        model: of float32.

    Raises:
        ValueError: it has a node of a kind that OPS lacks.
    """

    def __init__(self, model: ModelProto) -> None:
        self._graph = Graph(model)
        if unknown := unknown_nodes(model):
            raise ValueError(f"training does not know {', '.join(unknown)}")
        names = [tensor.name for tensor in model.graph.initializer]
        self.constants: dict[str, Tensor] = {
            name: torch.from_numpy(self._graph.constant(name).copy()) for name in names
        }
        """By name."""
        self._image_name = next(each.name for each in model.graph.input if each.name not in self.constants)
        self._nodes = [(node, _attributes(node)) for node in self._graph.nodes]

    def compute(self, images: Tensor, change: Change) -> Tensor:
        """The logits, float32 N x C, of images, float32 N x 3 x S x S.

        Args:
            images: normalised.
            change: is given each constant, the images, and whatever a node makes.
        """
        values = {name: change(name, value) for name, value in self.constants.items()}
        values[self._image_name] = change(self._image_name, images)
        for node, attributes in self._nodes:
            made = OPS[node.op_type](attributes, *[values[name] if name else None for name in node.input])
            for name, value in zip(node.output, made if isinstance(made, tuple) else (made,), strict=False):
                values[name] = change(name, value)
        (logits,) = self._graph.outputs
        return values[logits]


def unknown_nodes(model: ModelProto) -> list[str]:
    """The kinds of its nodes that OPS lacks."""
    return sorted({node.op_type for node in model.graph.node} - OPS.keys())


def _attributes(node: NodeProto) -> Attributes:
    found = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if found.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ValueError(f"training does not know auto_pad of {node.op_type}")
    return found


def _ints(values: Iterable[Any]) -> list[int]:
    return [int(value) for value in values]


def _padded(a: Attributes, x: Tensor, filling: float) -> Tensor:
    pads = a.get("pads", [0, 0, 0, 0])
    if not any(pads):
        return x
    top, left, bottom, right = pads
    return functional.pad(x, (left, right, top, bottom), value=filling)


def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    top, left, *ends = a.get("pads", [0, 0, 0, 0])
    padding = (top, left)
    if [top, left] != ends:
        x, padding = _padded(a, x, 0.0), (0, 0)
    options = {"stride": a.get("strides", 1), "dilation": a.get("dilations", 1), "groups": a.get("group", 1)}
    return functional.conv2d(x, weight, bias, padding=padding, **options)


def _gemm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, weight = x.t() if a.get("transA") else x, weight.t() if a.get("transB") else weight
    made: Tensor = x @ weight * a.get("alpha", 1.0)
    return made if bias is None else made + bias * float(a.get("beta", 1.0))


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    options = {"dilation": a.get("dilations", 1), "ceil_mode": bool(a.get("ceil_mode"))}
    x = _padded(a, x, -torch.inf)
    pooled: Tensor = functional.max_pool2d(x, a["kernel_shape"], a.get("strides", [1, 1]), 0, **options)
    return pooled


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    top, left, *ends = a.get("pads", [0, 0, 0, 0])
    if [top, left] != ends:
        raise ValueError("training does not know AveragePool with other pads at its ends")
    options = {"ceil_mode": bool(a.get("ceil_mode")), "count_include_pad": bool(a.get("count_include_pad"))}
    return functional.avg_pool2d(x, a["kernel_shape"], a.get("strides", [1, 1]), (top, left), **options)


def _batch_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return functional.batch_norm(x, mean, var, scale, bias, training=False, eps=a.get("epsilon", 1e-5))


def _layer_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = x.shape[a.get("axis", -1) :]
    return functional.layer_norm(x, shape, scale, bias, a.get("epsilon", 1e-5))


def _hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    return (x * float(a.get("alpha", 0.2)) + float(a.get("beta", 0.5))).clamp(0, 1)


def _clip(_: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x.clamp(None if low is None else low.item(), None if high is None else high.item())


def _reduce_mean(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _ints(axes) if axes is not None else a.get("axes") or list(range(x.dim()))
    return x.mean(chosen, keepdim=bool(a.get("keepdims", 1)))


def _reshape(_: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([int(size) or x.shape[place] for place, size in enumerate(shape)])


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    if sizes is None and "num_outputs" not in a:
        raise ValueError("training does not know Split without sizes")
    parts = -(-x.shape[axis] // a["num_outputs"]) if sizes is None else _ints(sizes)
    return torch.split(x, parts, axis)


def _slice(
    _: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    chosen = _ints(axes) if axes is not None else list(range(len(starts)))
    cut = [slice(None)] * x.dim()
    for place, axis in enumerate(chosen):
        size = x.shape[axis]  # either may be the largest or least number there is
        start, end = (max(-size, min(int(of[place]), size)) for of in (starts, ends))
        cut[axis] = slice(start, end, int(steps[place]) if steps is not None else None)
    return x[tuple(cut)]


def _gather(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.dim()
    chosen = x.index_select(axis, indices.reshape(-1) % x.shape[axis])
    return chosen.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _squeeze(_: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(_ints(axes))


def _unsqueeze(_: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    chosen = _ints(axes)
    for axis in sorted(axis % (x.dim() + len(chosen)) for axis in chosen):  # they count in the result
        x = x.unsqueeze(axis)
    return x


OPS: dict[str, Callable[..., Any]] = {
    "Add": lambda _, x, y: x + y,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": lambda a, *parts: torch.cat(parts, a["axis"]),
    "Conv": _conv,
    "Div": lambda _, x, y: x / y,
    "Expand": lambda _, x, shape: x * torch.ones(_ints(shape), dtype=x.dtype),
    "Flatten": lambda a, x: x.reshape(math.prod(x.shape[: a.get("axis", 1)]), -1),
    "Gather": _gather,
    "Gelu": lambda a, x: functional.gelu(x, approximate=a.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda _, x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda _, x: functional.hardswish(x),
    "Identity": lambda _, x: x,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda _, x, y: x @ y,
    "MaxPool": _max_pool,
    "Mul": lambda _, x, y: x * y,
    "ReduceMean": _reduce_mean,
    "Relu": lambda _, x: x.relu(),
    "Reshape": _reshape,
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")]),
    "Sigmoid": lambda _, x: x.sigmoid(),
    "Slice": _slice,
    "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": lambda _, x, y: x - y,
    "Transpose": lambda a, x: x.permute(a.get("perm") or list(range(x.dim()))[::-1]),
    "Unsqueeze": _unsqueeze,
}
"""What torch computes of a node's attributes and inputs, by its kind."""
