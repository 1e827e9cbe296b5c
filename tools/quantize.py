"""int8 by ONNX Runtime: static, per channel, calibrated on training images."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.engine.schedule import epoch_order

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from launcher.tools.evaluate import BestModel

NUM_CALIBRATION_IMAGES = 256


def quantize_onnx(source: Path, target: Path, best: BestModel) -> None:
    """Make an int8 model (QDQ: uint8 activations, int8 weights per channel) of an exported one.

    The activations' ranges are the least and greatest values over a fixed random choice of training images, seen as
    validation sees them.

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
        # Folds BatchNorm into the convolutions first: ranges are then those of what is computed.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            TrainingImages(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=saturates(),
            calibrate_method=CalibrationMethod.MinMax,
        )
    _copy_metadata(source, target)


def saturates(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU adds pairs of uint8 x int8 products in 16 bits, where they can overflow: x86 without VNNI.

    Weights of 7 bits then keep the sums right (ONNX Runtime's documentation on quantization, "U8S8 saturation").
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    text = cpuinfo.read_text(encoding="utf-8")
    return "avx512_vnni" not in text and "avx_vnni" not in text


def _copy_metadata(source: Path, target: Path) -> None:
    import onnx

    found: Any = onnx.load(source, load_external_data=False).metadata_props
    model = onnx.load(target)
    onnx.helper.set_model_props(model, {entry.key: entry.value for entry in found})
    onnx.save(model, target)
