"""An ONNX file that does the preprocessing itself: uint8 N x H x W x 3 of any size in, probabilities out.

ONNX Runtime resizes 8-bit images by Pillow's own rules (``antialias``), so that its pixels are those of validation up
to two levels of 255; whether the answers are the checkpoint's is measured as for any export.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.tools import onnx_model
from launcher.tools.onnx_model import INPUT, PROBABILITIES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx
    import onnxruntime
    import torch
    from numpy.typing import NDArray

    from launcher.tools.evaluate import BestModel

    Floats = NDArray[np.float32]

BAKED = "baked"
"""Key of a file's metadata: what goes in and comes out, as JSON."""
OPSET = 18
"""The first whose Resize antialiases."""
PILLOW_CUBIC = -0.5
GREY = (19595, 38470, 7471)
"""Parts of 65,536 of red, green and blue in Pillow's L."""
SMALLEST = 1e-30


def bake(model: onnx.ModelProto, facts: dict[str, Any], *, independent: bool, temperature: float) -> onnx.ModelProto:
    """The model with everything around it in its graph.

    Args:
        model: from ``images`` (float32 N x C x S x S, normalised; C is 1 or 3) to ``logits``.
        facts: the preprocessing, as exports carry it.
        independent: probabilities are sigmoids of logits; else a softmax.
        temperature: what logits are divided by before.
    """
    import onnx
    from onnx import compose, version_converter

    known = onnx_model.read_metadata(model)
    version = model.opset_import[0].version
    if version < OPSET:
        model = version_converter.convert_version(model, OPSET)
        version = OPSET
    before, after = _before(facts, version), _after(independent=independent, temperature=temperature, version=version)
    for part in (before, after):
        part.ir_version = model.ir_version
    whole = compose.merge_models(before, model, io_map=[("normalised", "images")], prefix1="before_")
    made = compose.merge_models(whole, after, io_map=[("logits", "raw")], prefix2="after_")
    _rename(made, f"before_{INPUT}", INPUT)
    _rename(made, f"after_{PROBABILITIES}", PROBABILITIES)
    said = {BAKED: json.dumps({"input": "uint8 N x H x W x 3 (RGB)", "output": PROBABILITIES})}
    onnx.helper.set_model_props(made, known | said)
    return made


def _before(facts: dict[str, Any], version: int) -> onnx.ModelProto:
    """Resize, centre crop, grey and normalisation, as :func:`launcher.images.pixels.centre_crop` does them."""
    from onnx import parser

    size, method = facts["image_size"], {"bilinear": "linear", "bicubic": "cubic"}[facts["interpolation"]]
    cubic = f", cubic_coeff_a = {PILLOW_CUBIC}" if method == "cubic" else ""
    grey = ""
    if facts.get("channels") == 1:
        grey = f"""
            channel = Constant <value = int64[1] {{1}}> ()
            wide = Cast <to = 6> (cropped)
            parts = Constant <value = int32[1,3,1,1] {{{", ".join(map(str, GREY))}}}> ()
            weighed = Mul (wide, parts)
            summed = ReduceSum <keepdims = 1> (weighed, channel)
            half = Constant <value = int32[1] {{32768}}> ()
            whole = Constant <value = int32[1] {{65536}}> ()
            raised = Add (summed, half)
            grey = Div (raised, whole)"""
    last, channels = ("grey" if grey else "cropped"), len(facts["mean"])
    text = f"""
        <ir_version: 10, opset_import: ["" : {version}]>
        before (uint8[batch, height, width, 3] {INPUT}) => (float[batch, {channels}, {size}, {size}] normalised) {{
            planes = Transpose <perm = [0, 3, 1, 2]> ({INPUT})
            ends = Shape <start = 2> (planes)
            kept = Shape <end = 2> (planes)
            shortest = ReduceMin <keepdims = 1> (ends)
            wanted = Constant <value = int64[1] {{{facts["resize_size"]}}}> ()
            scaled = Mul (ends, wanted)
            sides = Div (scaled, shortest)
            sizes = Concat <axis = 0> (kept, sides)
            resized = Resize <mode = "{method}", antialias = 1, coordinate_transformation_mode = "half_pixel"{cubic}>
                (planes, , , sizes)
            crop = Constant <value = int64[1] {{{size}}}> ()
            spare = Sub (sides, crop)
            spare_float = Cast <to = 1> (spare)
            two = Constant <value = float[1] {{2.0}}> ()
            halves = Div (spare_float, two)
            rounded = Round (halves)
            starts = Cast <to = 7> (rounded)
            stops = Add (starts, crop)
            axes = Constant <value = int64[2] {{2, 3}}> ()
            cropped = Slice (resized, starts, stops, axes){grey}
            levels = Cast <to = 1> ({last})
            most = Constant <value = float[1] {{255.0}}> ()
            fractions = Div (levels, most)
            mean = Constant <value = float[1,{channels},1,1] {{{_numbers(facts["mean"])}}}> ()
            std = Constant <value = float[1,{channels},1,1] {{{_numbers(facts["std"])}}}> ()
            centred = Sub (fractions, mean)
            normalised = Div (centred, std)
        }}"""
    return parser.parse_model(text)


def _after(*, independent: bool, temperature: float, version: int) -> onnx.ModelProto:
    from onnx import parser

    last = "Sigmoid (tempered)" if independent else "Softmax <axis = 1> (tempered)"
    return parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : {version}]>
        after (float[batch, classes] raw) => (float[batch, classes] {PROBABILITIES}) {{
            by = Constant <value = float[1] {{{_numbers([temperature])}}}> ()
            tempered = Div (raw, by)
            {PROBABILITIES} = {last}
        }}""")


def _numbers(values: Any) -> str:
    return ", ".join(f"{float(np.float32(value)):.9e}" for value in values)


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name == old:
            value.name = new
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new


def logits(session: onnxruntime.InferenceSession, images: NDArray[np.uint8], meaning: Any) -> Floats:
    """Logits (up to a constant of each image) that a file's probabilities come of.

    Args:
        session: the file.
        images: uint8 N x H x W x 3.
        meaning: ``independent`` and ``temperature`` of the file.
    """
    found = np.asarray(session.run([PROBABILITIES], {INPUT: images})[0], np.float64).clip(SMALLEST, 1.0)
    odds = found / (1 - found).clip(SMALLEST) if meaning.independent else found
    return np.asarray(np.log(odds) * meaning.temperature, np.float32)


class OfFiles:
    """The predictor of a baked file: it takes its images, in order, from the data set itself, before any crop.

    Args:
        session: the file.
        best: whose validation images.
    """

    def __init__(self, session: onnxruntime.InferenceSession, best: BestModel) -> None:
        self._session = session
        self._best = best
        self._rest: Iterator[NDArray[np.uint8]] = iter(())

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of as many images as are given, the next ones; after the last one it begins again."""
        import torch

        found = []
        for _ in images:
            pixels = next(self._rest, None)
            if pixels is None:
                self._rest = self._images()
                pixels = next(self._rest)
            found.append(logits(self._session, pixels[None], self._best)[0])
        return torch.from_numpy(np.stack(found))

    def _images(self) -> Iterator[NDArray[np.uint8]]:
        dataset = self._best.dataset("val")
        for index in range(len(dataset)):
            yield np.ascontiguousarray(dataset.load(index).permute(1, 2, 0).numpy())
