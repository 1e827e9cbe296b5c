"""int8 by ONNX Runtime: static, per channel, calibrated on training images; the first layers in float if need be."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.engine.schedule import epoch_order
from launcher.system import cpu as host_cpu
from launcher.system.cpu import PORTABLE_BITS
from launcher.tools.onnx_model import QUANTIZATION, read_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from launcher.tools.evaluate import BestModel

    Images = dict[str, NDArray[np.float32]]

NUM_CALIBRATION_IMAGES = 256
NUM_IN_FLOAT = (0, 5, 12, 20)
"""First layers that stay in float, tried one after the other until the model is accepted: what they round off goes
through the whole network (docs/exports.md)."""
LAYERS = ("Conv", "Gemm", "MatMul")


def quantize_onnx(source: Path, target: Path, best: BestModel, judge: Callable[[Path], str | None]) -> None:
    """Make an int8 model (QDQ: uint8 activations, int8 weights per channel) of an exported one.

    The activations' ranges are the least and greatest values over a fixed random choice of training images, seen as
    validation sees them. ``post.target`` says whether its weights may use all 8 bits. Where the model is not accepted,
    its first layers stay in float. The metadata say what was done and what was tried.

    Args:
        source: an ONNX file of float32.
        target: where the int8 model goes.
        best: the checkpoint that ``source`` was made of.
        judge: why a file is not accepted; None: it is.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    target_cpus = best.recipe.post.target
    bits = weight_bits(target_cpus)
    indices = epoch_order(best.recipe.seed, 0, len(best.dataset("train")))[:NUM_CALIBRATION_IMAGES].tolist()
    calibration: list[Images] = [{"images": images.numpy()} for images, _ in best.batches("train", indices)]
    made: dict[str, Any] = {"target": target_cpus, "weight_bits": bits, "activation_bits": 8}
    made |= {"calibration_images": len(indices)}
    tried: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".quantize-") as folder:
        prepared = Path(folder) / "prepared.onnx"
        # folds BatchNorm into the convolutions first, so that ranges are those of the values that are computed
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        layers = _layers(prepared)
        for num in NUM_IN_FLOAT:
            in_float = layers[:num]
            _quantize(prepared, target, calibration, bits=bits, in_float=in_float)
            tried.append({"float_layers": len(in_float), "reason": judge(target)})
            if tried[-1]["reason"] is None:
                break
    _write_metadata(source, target, {QUANTIZATION: json.dumps(made | {"float_layers": in_float, "tried": tried})})


def _quantize(source: Path, target: Path, calibration: Sequence[Images], *, bits: int, in_float: Sequence[str]) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantize_static(
        source,
        target,
        _reader(calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=bits == PORTABLE_BITS,
        nodes_to_exclude=list(in_float),
        calibrate_method=CalibrationMethod.MinMax,
    )


def _reader(batches: Iterable[Images]) -> Any:
    """Feeds batches one by one, as ONNX Runtime wants them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> Images | None:  # type: ignore[override]  # None ends it
            return next(self._batches, None)

    return Reader()


def _layers(source: Path) -> list[str]:
    """Names of a model's convolutions and products, in the order in which they are computed."""
    import onnx

    return [node.name for node in onnx.load(source, load_external_data=False).graph.node if node.op_type in LAYERS]


def weight_bits(target_cpus: str) -> int:
    """Bits of the weights for ``post.target``: 7 where the CPUs meant may add products in 16 bits."""
    if target_cpus == "this":
        return PORTABLE_BITS if host_cpu.saturates_int8() else 8
    return {"portable": PORTABLE_BITS, "vnni": 8}[target_cpus]


def _write_metadata(source: Path, target: Path, more: dict[str, str]) -> None:
    """Give ``target`` the metadata of ``source``, and ``more``."""
    import onnx

    known = read_metadata(onnx.load(source, load_external_data=False))
    model: Any = onnx.load(target)
    onnx.helper.set_model_props(model, known | more)
    onnx.save(model, target)
