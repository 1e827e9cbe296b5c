"""Smooth activations in int8, on a small graph like those of MobileNetV3 and EfficientNet."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from launcher.tools.int8 import activations, calibration, qdq
from launcher.tools.int8.graph import Graph

CHANNELS, SIZE, BITS = 64, 4, 7
GATES = {
    "HardSigmoid": helper.make_node("HardSigmoid", ["made"], ["gate"], "gate", alpha=1 / 6, beta=0.5),
    "Sigmoid": helper.make_node("Sigmoid", ["made"], ["gate"], "gate"),
}


def network(*activation):
    """A 1 x 1 convolution, most of whose values are far below 0, and what makes ``logits`` of them."""
    weight = np.ones((2, CHANNELS, 1, 1), np.float32)
    nodes = [helper.make_node("Conv", ["images", "weight"], ["made"], "conv"), *activation]
    graph = helper.make_graph(
        nodes,
        "smooth",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", CHANNELS, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2, SIZE, SIZE])],
        [numpy_helper.from_array(weight, "weight")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made)


def product(gate):
    return network(GATES[gate], helper.make_node("Mul", ["made", "gate"], ["logits"], "times"))


def run(model, images):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


@pytest.mark.parametrize("gate", GATES)
def test_what_an_activation_makes_zero_takes_no_steps_from_the_rest(gate, monkeypatch):
    model = product(gate)
    images = np.random.default_rng(0).uniform(-1, 1, (8, CHANNELS, SIZE, SIZE)).astype(np.float32)
    images[0, :, 0, 0], images[0, :, 1, 1] = -1, 0.2  # the ends of the range: far below 0, little above
    ranges = calibration.measure(model, [images], threads=1)
    expected, errors = run(model, images), []
    for found in (activations.find, lambda graph: []):
        monkeypatch.setattr(activations, "find", found)
        errors.append(np.square(run(qdq.quantize(model, ranges, bits=BITS), images) - expected).mean())
    assert errors[0] < 0.5 * errors[1]


def test_activations_are_found_by_what_they_compute():
    [hard] = activations.find(Graph(product("HardSigmoid")))
    assert (hard.read, hard.nodes) == ("made", ("gate", "times"))
    low, high = hard.useful(-60, 6)
    assert -3.1 < low < -2.9
    assert high == 6
    [silu] = activations.find(Graph(product("Sigmoid")))
    assert -10 < silu.useful(-60, 6)[0] < -4
    assert silu.useful(-0.5, 0.5) == pytest.approx((-0.5, 0.5), abs=0.01)
    [gate] = activations.find(Graph(network(helper.make_node("HardSigmoid", ["made"], ["logits"], "g", alpha=1 / 6))))
    assert gate.nodes == ("g",)
    low, high = gate.useful(-9, 9)
    assert -3.1 < low < -2.9
    assert 2.9 < high < 3.1


def test_an_activation_whose_input_others_read_too_is_none():
    shared = network(GATES["Sigmoid"], helper.make_node("Add", ["made", "gate"], ["logits"], "sum"))
    assert activations.find(Graph(shared)) == []
