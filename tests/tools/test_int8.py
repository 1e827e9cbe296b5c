"""What is done to a model before it is quantized, on a small graph like a mobile network's."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from launcher.tools.int8 import calibration, equalize, qat, qdq
from launcher.tools.int8.graph import Graph
from launcher.tools.int8.torch_graph import TorchGraph

CHANNELS, CLASSES, SIZE = 8, 5, 6
BITS = 7


@pytest.fixture
def images():
    generator = np.random.default_rng(1)
    return [generator.uniform(0, 1, (8, 3, SIZE, SIZE)).astype(np.float32) for _ in range(4)]


@pytest.fixture
def model():
    """A convolution whose channels are of very different width, a clip, a depthwise convolution and a product."""
    rng = np.random.default_rng(0)
    widths = np.geomspace(0.06, 2, CHANNELS)
    pixels = CHANNELS * SIZE * SIZE
    constants = {
        "w1": rng.uniform(-0.3, 1, (CHANNELS, 3, 1, 1)) * widths[:, None, None, None],
        "b1": rng.uniform(0, 0.1, CHANNELS) * widths,
        "zero": np.array(0),
        "six": np.array(6),
        "w2": rng.normal(size=(CHANNELS, 1, 3, 3)),
        "b2": rng.normal(size=CHANNELS),
        "w3": rng.normal(size=(CLASSES, pixels)),
        "b3": rng.normal(size=CLASSES),
    }
    nodes = [
        helper.make_node("Conv", ["images", "w1", "b1"], ["first"]),
        helper.make_node("Clip", ["first", "zero", "six"], ["clipped"]),
        helper.make_node("Conv", ["clipped", "w2", "b2"], ["second"], group=CHANNELS, pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["second"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "mobile",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made)


def run(model, images):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": np.concatenate(images)})[0]


def test_equalizing_makes_channels_equally_wide_and_changes_no_answer(model, images):
    graph = Graph(model)
    before = calibration.measure(model, images, threads=1)
    after = equalize.equalize(graph, before)
    np.testing.assert_allclose(run(graph.model, images), run(model, images), rtol=1e-4, atol=1e-4)
    widths = [ranges["clipped"].high.max() / ranges["clipped"].high.min() for ranges in (before, after)]
    assert widths[0] > 10
    assert widths[1] < 2
    measured = calibration.measure(graph.model, images, threads=1)["clipped"].high
    np.testing.assert_allclose(after["clipped"].high, measured, rtol=1e-4)
    assert not np.array_equal(Graph(model).constant("w1"), graph.constant("w1"))  # the model itself is as it was


def test_corrected_biases_make_up_for_much_of_what_rounding_costs(model, images):
    ranges = calibration.measure(model, images, threads=1)
    expected = run(model, images)
    errors = []
    for is_corrected in (False, True):
        graph = Graph(model)
        if is_corrected:
            qdq.correct_biases(graph, ranges, bits=BITS)
        for node in graph.layers:
            graph.set_constant(node.input[1], qdq._rounded(graph.constant(node.input[1]), BITS))
        errors.append(np.square(run(graph.model, images) - expected).mean())
    assert 0 < errors[1] < 0.7 * errors[0]


def test_training_computes_what_the_int8_model_computes(model, images):
    quantized = qdq.quantize(model, calibration.measure(model, images, threads=1), bits=BITS)
    expected, rounded = run(model, images), run(quantized, images)
    given = torch.from_numpy(np.concatenate(images))
    network = TorchGraph(model)
    np.testing.assert_allclose(
        network.compute(given, lambda name, value: value).numpy(), expected, rtol=1e-4, atol=1e-4
    )
    found = network.compute(given, qat._Rounding(model, quantized, bits=BITS)).numpy()
    assert np.square(found - rounded).mean() < 0.1 * np.square(rounded - expected).mean()


def test_fine_tuning_brings_the_int8_model_nearer_to_its_teacher(model, images):
    ranges = calibration.measure(model, images, threads=1)
    quantized, expected, original = qdq.quantize(model, ranges, bits=BITS), run(model, images), TorchGraph(model)
    lesson = qat.Lesson(
        steps=100,
        images=[torch.from_numpy(images[step % len(images)]) for step in range(100)],
        teacher=lambda batch: original.compute(batch, lambda name, value: value),
    )
    trained = qdq.quantize(qat.train(model, quantized, lesson, bits=BITS), ranges, bits=BITS)
    errors = [np.square(run(each, images) - expected).mean() for each in (quantized, trained)]
    assert 0 < errors[1] < 0.7 * errors[0]


SHAPE = 2, 3, 4, 1
NODES = [
    ("Unsqueeze", {}, [[-1, -3]]),
    ("Unsqueeze", {}, [[-2, 0]]),
    ("Split", {"axis": -2}, [[1, 3]]),
    ("Split", {"axis": -3, "num_outputs": 2}, []),
    ("Slice", {}, [[-3], [2**63 - 1], [-2], [2]]),
    ("Slice", {}, [[0], [-1], [-3]]),
    ("Slice", {}, [[-(2**63)], [2**63 - 1], [2]]),
    ("Gather", {"axis": -2}, [[-1, 0]]),
    ("ReduceMean", {"keepdims": 0}, [[-2, -3]]),
    ("Expand", {}, [[3, 1, 5]]),
    ("Squeeze", {}, [[-1]]),
    ("Flatten", {"axis": -2}, []),
]


@pytest.mark.parametrize(("kind", "attributes", "given"), NODES)
def test_training_computes_a_node_as_onnx_runtime_does(kind, attributes, given):
    constants = [numpy_helper.from_array(np.array(each, np.int64), f"c{at}") for at, each in enumerate(given)]
    outputs = ["first", "second"] if kind == "Split" else ["first"]
    node = helper.make_node(kind, ["images", *(each.name for each in constants)], outputs, **attributes)
    whole = numpy_helper.from_array(np.array(1, np.float32), "one")
    graph = helper.make_graph(
        [node, helper.make_node("Mul", [outputs[-1], "one"], ["logits"])],
        "one node",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [*constants, whole],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    images = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    found = TorchGraph(made).compute(torch.from_numpy(images), lambda name, value: value).numpy()
    np.testing.assert_allclose(found, run(made, [images]), rtol=1e-5, atol=1e-6, strict=True)


def test_what_training_cannot_compute_is_named(model):
    model.graph.node[1].op_type = "Celu"
    with pytest.raises(ValueError, match="training does not know Celu"):
        TorchGraph(model)
