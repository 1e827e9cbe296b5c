"""int8 by ONNX Runtime: static, per channel, calibrated on training images."""

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
    import numpy as np
    from numpy.typing import NDArray

    from launcher.tools.evaluate import BestModel

NUM_CALIBRATION_IMAGES = 256


def quantize_onnx(source: Path, target: Path, best: BestModel) -> None:
    """Make an int8 model (QDQ: uint8 activations, int8 weights per channel) of an exported one.

    The activations' ranges are the least and greatest values over a fixed random choice of training images, seen as
    validation sees them. ``post.target`` says whether its weights may use all 8 bits; the metadata say what was done.

    Args:
        source: an ONNX file of float32.
        target: where the int8 model goes.
        best: the checkpoint that ``source`` was made of.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    target_cpus = best.recipe.post.target
    bits = weight_bits(target_cpus)
    indices = epoch_order(best.recipe.seed, 0, len(best.dataset("train")))[:NUM_CALIBRATION_IMAGES].tolist()

    class TrainingImages(CalibrationDataReader):
        """Feeds the chosen images batch by batch."""

        def __init__(self) -> None:
            self._batches = best.batches("train", indices)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:  # type: ignore[override]  # None ends it
            found = next(self._batches, None)
            return None if found is None else {"images": found[0].numpy()}

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".quantize-") as folder:
        prepared = Path(folder) / "prepared.onnx"
        # folds BatchNorm into the convolutions first, so that ranges are those of the values that are computed
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            TrainingImages(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=bits == PORTABLE_BITS,
            calibrate_method=CalibrationMethod.MinMax,
        )
    made = {"target": target_cpus, "weight_bits": bits, "activation_bits": 8, "calibration_images": len(indices)}
    _write_metadata(source, target, {QUANTIZATION: json.dumps(made)})


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
