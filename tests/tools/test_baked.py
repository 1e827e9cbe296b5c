"""ONNX files that do the preprocessing themselves: the pixels of validation, and what they say as probabilities."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import launcher
from launcher.images import pixels
from launcher.tools import baked, onnx_model, trained_model
from tests import odd_images
from tests.tools.test_predict import COLOURS, PREPROCESSING, write_model


def opened(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "settings",
    [
        PREPROCESSING,
        replace(PREPROCESSING, interpolation="bicubic"),
        replace(PREPROCESSING, channels=1, mean=(0.4,), std=(0.25,)),
        replace(PREPROCESSING, resize_size=16),
    ],
    ids=["bilinear", "bicubic", "grey", "no crop"],
)
def test_its_pixels_are_those_of_validation_up_to_two_levels(settings, tmp_path):
    session = opened(baked._before(settings.describe(), 18))
    for path in odd_images.write(tmp_path / "odd").values():
        with Image.open(path) as image:
            rgb = pixels.to_rgb(image)
        planes = torch.from_numpy(np.asarray(rgb).transpose(2, 0, 1).copy())
        seen = settings.normalize(settings.transform()(planes)[None]).numpy()
        (found,) = session.run(None, {"images": np.asarray(rgb)[None]})
        assert np.abs(found - seen).max() <= 2.01 / 255 / min(settings.std), path.name


@pytest.mark.parametrize(
    "metadata", [{}, {"temperature": 2.5}, {"independent": True, "threshold": 0.6, "temperature": 2.0}], ids=str
)
def test_a_program_gets_probabilities_and_predict_says_the_same_as_with_the_plain_file(metadata, tmp_path):
    plain = write_model(tmp_path / "model.onnx", **metadata)
    made = baked.bake(
        onnx.load(plain),
        PREPROCESSING.describe(),
        independent=metadata.get("independent", False),
        temperature=metadata.get("temperature", 1.0),
    )
    onnx.checker.check_model(made, full_check=True)
    target = tmp_path / "model.baked.onnx"
    onnx.save(made, target)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == list(COLOURS)
    assert json.loads(said["baked"]) == {"input": "uint8 N x H x W x 3 (RGB)", "output": "probabilities"}
    images = np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3), dtype=np.uint8)
    (found,) = session.run(["probabilities"], {"images": images})
    expected = trained_model.load(plain).predict(list(images), top=3)
    for row, one in zip(found, launcher.load(target, many=True).predict(list(images), top=3), strict=True):
        known = dict(zip(COLOURS, row.tolist(), strict=True))
        assert [probability for _, probability in one.top] == pytest.approx(
            [known[name] for name, _ in one.top], abs=1e-6
        )
    for one, plainly in zip(launcher.load(target).predict(list(images), top=3), expected, strict=True):
        assert [name for name, _ in one.top] == [name for name, _ in plainly.top]
        assert [p for _, p in one.top] == pytest.approx([p for _, p in plainly.top], abs=0.01)
    assert onnx_model.compute(session, np.zeros((4, 3, 16, 16), np.float32)).shape == (4, 3)


def test_a_model_with_one_input_is_baked(tmp_path):
    grey = replace(PREPROCESSING, channels=1, mean=(0.4,), std=(0.25,))
    shapes = [("images", ["N", 1, 16, 16]), ("logits", ["N", 2])]
    images, logits = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims) for name, dims in shapes)
    nodes = [
        onnx.helper.make_node("ReduceMean", ["images"], ["mean"], axes=[2, 3], keepdims=0),
        onnx.helper.make_node("Neg", ["mean"], ["less"]),
        onnx.helper.make_node("Concat", ["less", "mean"], ["logits"], axis=1),
    ]
    graph = onnx.helper.make_graph(nodes, "brightness", [images], [logits])
    plain = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    made = baked.bake(plain, grey.describe(), independent=False, temperature=1.0)
    onnx.checker.check_model(made, full_check=True)
    levels = np.stack([np.full((20, 30, 3), level, np.uint8) for level in (0, 255)])
    (found,) = opened(made).run(["probabilities"], {"images": levels})
    assert found.argmax(axis=1).tolist() == [0, 1]
    assert onnx_model.compute(opened(made), np.zeros((4, 1, 16, 16), np.float32)).shape == (4, 2)
