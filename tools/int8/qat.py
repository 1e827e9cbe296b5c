"""Quantization-aware fine-tuning: the weights of an int8 model learn to give the checkpoint's logits after rounding.

What is trained is the graph that is shipped: BatchNorm is folded into it, channels are equalized, and each tensor that
the int8 model rounds is rounded in the forward pass, while gradients pass as if it were not (Bengio and others 2013,
arXiv 1308.3432; Jacob and others, CVPR 2018; that training begins from an equalized model: Nagel and others 2021, arXiv
2106.08295). The loss is the squared distance of the logits from those of the float checkpoint (Ba and Caruana, NIPS
2014; better than the divergence of probabilities: Kim and others, IJCAI 2021, arXiv 2105.08919). It asks for what the
gate measures, needs no labels and is the same for classes that are independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from launcher.system import phases
from launcher.tools.int8 import qdq
from launcher.tools.int8.graph import Graph
from launcher.tools.int8.torch_graph import TorchGraph
from launcher.tools.int8.weights import output_channels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from onnx import ModelProto
    from torch import Tensor

RATE = 1e-4
"""Adam's, at the beginning; it falls to 0 as a half cosine does."""
HIGHEST = 255
"""Of uint8, as which activations are kept."""
RUNG = "qat"
OF_AN_OUTPUT, ROUNDED = "_QuantizeLinear_Input", "_quantized"
"""What ONNX Runtime adds to the names of the graph's output before it is rounded, and of constants that are."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What there is to learn from.

    Attributes:
        steps: of the optimizer.
        images: so many batches, normalised, float32 N x C x S x S.
        teacher: the checkpoint.
    """

    steps: int
    images: Iterable[Tensor]
    teacher: Callable[[Tensor], Tensor]


def train(model: ModelProto, quantized: ModelProto, lesson: Lesson, *, bits: int) -> ModelProto:
    """The model with other weights, which lose less by being rounded.

    Args:
        model: of float32.
        quantized: made of it by :func:`launcher.tools.int8.qdq.quantize`: it says what is rounded, and how.
        lesson: what it learns from.
        bits: of the weights, 7 or 8.

    Raises:
        ValueError: it computes something that training does not know.
    """
    network, rounding = TorchGraph(model), _Rounding(model, quantized, bits=bits)
    learned = {name: network.constants[name].requires_grad_() for name in rounding.learned}
    optimizer = torch.optim.Adam(learned.values(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=lesson.steps)
    with phases.during("fine-tuning the int8 model") as told:
        for step, images in enumerate(lesson.images):
            told(step, lesson.steps)
            with torch.no_grad():
                wanted = lesson.teacher(images)
            loss = functional.mse_loss(network.compute(images, rounding), wanted)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    graph = Graph(model)
    for name, tensor in learned.items():
        graph.set_constant(name, tensor.detach().numpy())
    return graph.model


class _Rounding:
    """Rounds, of a float model's tensors, those that the int8 model made of it rounds.

    Args:
        model: of float32.
        quantized: made of it.
        bits: of the weights.
    """

    def __init__(self, model: ModelProto, quantized: ModelProto, *, bits: int) -> None:
        graph, made = Graph(model), Graph(quantized)
        self._most = qdq.most(bits)
        self._activations: dict[str, tuple[float, int]] = {}
        for node in made.nodes:
            if node.op_type == "QuantizeLinear" and not made.is_constant(node.input[0]):
                scale, zero = (made.constant(constant).item() for constant in node.input[1:])
                name = node.input[0].removesuffix(OF_AN_OUTPUT)
                self._activations[name] = float(scale), int(zero)
        self._channels: dict[str, int] = {}
        self.learned: list[str] = []
        """Names of the constants that training changes: weights and biases of layers."""
        for layer in graph.layers:
            names = [name for name in layer.input[1:] if graph.is_constant(name) and name not in self.learned]
            self.learned += names
            if made.is_constant(f"{layer.input[1]}{ROUNDED}"):
                dims = graph.constant(layer.input[1]).ndim
                self._channels[layer.input[1]] = output_channels(layer, dims)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name in self._activations:
            scale, zero = self._activations[name]
            return torch.fake_quantize_per_tensor_affine(value, scale, zero, 0, HIGHEST)
        if name in self._channels:
            axis = self._channels[name]
            others = [each for each in range(value.dim()) if each != axis]
            scales = (value.detach().abs().amax(others) / self._most).clamp(min=1e-12)
            zeros = torch.zeros(len(scales), dtype=torch.int32)
            return torch.fake_quantize_per_channel_affine(value, scales, zeros, axis, -self._most, self._most)
        return value
