"""Real int8 files with weights of 8 and of 7 bits: they compute right on every CPU."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from launcher.system import cpu as host_cpu
from launcher.tools import onnx_model, quantize

pytestmark = pytest.mark.skipif(not host_cpu.saturates_int8(), reason="this CPU has VNNI: nothing overflows")
CHANNELS = 64
"""Pairs of large products, all of one sign, overflow 16 bits."""


def write_int8(path, *, weight, metadata=None):
    """A convolution of uint8 images with equal int8 weights, as QDQ."""
    weights = np.full((8, CHANNELS, 3, 3), weight, np.int8)
    scale = 1.0 / (abs(weight) * CHANNELS * 9)
    constants = [
        numpy_helper.from_array(weights, "w"),
        numpy_helper.from_array(np.full(8, scale, np.float32), "w_scale"),
        numpy_helper.from_array(np.zeros(8, np.int8), "w_zero"),
        numpy_helper.from_array(np.float32(1 / 255), "scale"),
        numpy_helper.from_array(np.uint8(0), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["quantized"]),
        helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["weights"], axis=0),
        helper.make_node("Conv", ["x", "weights"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["y_quantized"]),
        helper.make_node("DequantizeLinear", ["y_quantized", "scale", "zero"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", CHANNELS, 3, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 8, 1, 1])
    model = helper.make_model(helper.make_graph(nodes, "g", [images], [logits], constants), ir_version=10)
    model.opset_import[0].version = 17
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def quantized_by(bits):
    return {"quantization": json.dumps({"target": "vnni", "weight_bits": bits})}


def test_without_care_wide_weights_give_wrong_answers_here(tmp_path):
    session = onnxruntime.InferenceSession(write_int8(tmp_path / "m.onnx", weight=127))
    (found,) = session.run(["logits"], {"images": np.ones((1, CHANNELS, 3, 3), np.float32)})
    assert np.abs(found - 1).max() > 0.2


@pytest.mark.parametrize("metadata", [quantized_by(8), {}, {"classes": "[]"}])
@pytest.mark.parametrize("weight", [127, -127])
def test_a_file_for_other_cpus_is_computed_right_and_said_to_be_one(tmp_path, metadata, weight):
    file = write_int8(tmp_path / "m.onnx", weight=weight, metadata=metadata)
    told: list[str] = []
    predict = onnx_model.onnx_predictor(file, threads=1, warn=told.append)
    logits = predict(torch.ones(1, CHANNELS, 3, 3))
    torch.testing.assert_close(logits, torch.full((1, 8, 1, 1), 1.0 if weight > 0 else 0.0), rtol=0, atol=0.02)
    assert len(told) == 1
    assert str(file) in told[0]
    assert "post.target: portable" in told[0]


@pytest.mark.parametrize("metadata", [quantized_by(7), {}])
def test_one_for_every_cpu_is_opened_as_it_is(tmp_path, metadata):
    file = write_int8(tmp_path / "m.onnx", weight=64, metadata=metadata)
    told: list[str] = []
    logits = onnx_model.onnx_predictor(file, threads=1, warn=told.append)(torch.ones(1, CHANNELS, 3, 3))
    torch.testing.assert_close(logits, torch.ones(1, 8, 1, 1), rtol=0, atol=0.02)
    assert told == []


def test_a_cpu_that_does_not_overflow_takes_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(host_cpu, "saturates_int8", lambda: False)
    told: list[str] = []
    onnx_model.onnx_predictor(write_int8(tmp_path / "m.onnx", weight=127), threads=1, warn=told.append)
    assert told == []


@pytest.mark.parametrize(
    ("target", "saturates", "bits"),
    [("portable", True, 7), ("portable", False, 7), ("vnni", True, 8), ("this", True, 7), ("this", False, 8)],
)
def test_the_bits_of_weights_follow_from_the_cpus_that_are_meant(monkeypatch, target, saturates, bits):
    monkeypatch.setattr(host_cpu, "saturates_int8", lambda: saturates)
    assert quantize.weight_bits(target) == bits
