"""Opens exported ONNX files on the CPU, so that int8 files compute correctly on every CPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from launcher.system import cpu as host_cpu
from launcher.system.cpu import FLOAT_BITS, PORTABLE_BITS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx
    import onnxruntime

    from launcher.tools.evaluate import Predictor

INDEPENDENT = "independent"
"""Key of a file's metadata: true as JSON if the logits are of sigmoids, each class by itself; else of a softmax."""
THRESHOLD = "threshold"
"""Key of a file's metadata, where an image has any number of classes: the probability from which on it has one."""
TEMPERATURE = "temperature"
"""Key of a file's metadata, where it was calibrated: what logits are divided by before they become probabilities."""
QUANTIZATION = "quantization"
"""Key of a quantized file's metadata: its rung and, of int8, ``{target, weight_bits, activation_bits, …}`` as JSON."""
INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
"""Names of what goes into a file and comes out of it; probabilities, where it does the preprocessing itself."""
EXACT_SUMS = "session.x64quantprecision"
"""ONNX Runtime's own option for x86 without VNNI: int8 weights become uint8, whose products it adds in 32 bits."""


def onnx_predictor(path: Path, *, threads: int, warn: Callable[[str], None]) -> Predictor:
    """A file opened by :func:`open_session`, for tensors."""
    import torch

    session = open_session(path, threads=threads, warn=warn)
    return lambda images: torch.from_numpy(compute(session, images.numpy()))


def is_baked(session: onnxruntime.InferenceSession) -> bool:
    """Whether a file does the preprocessing itself: it takes uint8 N x H x W x 3 and gives probabilities."""
    return str(session.get_inputs()[0].type) == "tensor(uint8)"


def compute(session: onnxruntime.InferenceSession, images: Any) -> Any:
    """Logits of normalised images, N x C x S x S; a file that does the preprocessing gets images of that size.

    What it says of those means nothing: it is for measuring time and memory.
    """
    if not is_baked(session):
        return session.run([LOGITS], {INPUT: images})[0]
    levels = (images * 255).clip(0, 255).astype("uint8").transpose(0, 2, 3, 1)
    levels = levels.repeat(3 // levels.shape[3], axis=3)  # such a file takes colours, whatever its model takes
    return session.run([PROBABILITIES], {INPUT: levels})[0]


def open_session(
    path: Path, *, threads: int, warn: Callable[[str], None], spinning: bool = True
) -> onnxruntime.InferenceSession:
    """A file opened in ONNX Runtime so that its answers are correct on every CPU.

    Args:
        path: a file as ``launch export`` makes it.
        threads: of the CPU.
        warn: gets a line if the file was made for other CPUs than this one.
        spinning: between two batches its threads wait busily: quicker where nothing else needs the cores.
    """
    settings = {} if spinning else {"session.intra_op.allow_spinning": "0"}
    session = _session(path, threads, settings)
    if overflows_here(path, session.get_modelmeta().custom_metadata_map):
        warn(
            f"{path}: made for CPUs with VNNI (or ARM), and this one has none: our own code computes it exactly, but "
            "slower; a program that opens it in another way gets wrong answers here. post.target: portable makes one "
            "for every CPU"
        )
        session = _session(path, threads, settings | {EXACT_SUMS: "1"})
    return session


def _session(path: Path, threads: int, settings: dict[str, str]) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in settings.items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def overflows_here(path: Path, metadata: dict[str, str]) -> bool:
    """Whether int8 weights of a file would overflow the sums of this CPU.

    Args:
        path: the file.
        metadata: of the file; if they do not say, as in a file of an earlier version, its weights are examined.
    """
    if not host_cpu.saturates_int8():
        return False
    said = json.loads(metadata.get(QUANTIZATION, "{}"))
    if said.get("activation_bits") == FLOAT_BITS:  # its weights are made float32 before anything is added
        return False
    bits = said.get("weight_bits") if said else weight_bits(path)
    return bits is not None and bits > PORTABLE_BITS


def weight_bits(path: Path) -> int | None:
    """Bits that the int8 weights of a file need, 7 or 8; None: it has none."""
    import onnx

    weights = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    if not weights:
        return None
    largest = max(abs(onnx.numpy_helper.to_array(tensor).astype("int16")).max(initial=0) for tensor in weights)
    return 8 if largest > 2 ** (PORTABLE_BITS - 1) else PORTABLE_BITS


def read_metadata(model: onnx.ModelProto) -> dict[str, str]:
    """A model's metadata, by key."""
    return {entry.key: entry.value for entry in model.metadata_props}


def read_quantization(path: Path) -> dict[str, Any] | None:
    """How a file was quantized, by its metadata; None: it was not."""
    import onnx

    found = read_metadata(onnx.load(path, load_external_data=False)).get(QUANTIZATION)
    return json.loads(found) if found else None
