"""Quantized models as a ladder: one way after the other is tried until one is accepted; each is told."""

from __future__ import annotations

import json
import shlex
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.engine.schedule import epoch_order
from launcher.system import cpu as host_cpu
from launcher.system import phases
from launcher.system.cpu import FLOAT_BITS, PORTABLE_BITS
from launcher.tools.onnx_model import QUANTIZATION, read_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto

    from launcher.tools.evaluate import BestModel

    Judge = Callable[[str, Path], tuple[str | None, dict[str, Any]]]
    """Of a format and a file: why it is not accepted (None: it is), and what it measured."""
    Say = Callable[[str], None]
    Rung = tuple[str, ModelProto, dict[str, Any]]
    """Its name, the model, and what the file's metadata say of it."""

NUM_CALIBRATION_IMAGES = 128
"""A fixed random choice of training images, seen as validation sees them."""
CALIBRATION_BATCH = 8
"""Images that are computed at once while all values of the network are looked at."""
FILES = {name: f"model.{name}.onnx" for name in ("int8", "int8_weights", "fp16", "int8_dynamic")}
OFFERED_STEPS = 200
"""Of quantization-aware fine-tuning, to who may try it."""
CALIBRATED = frozenset({"int8", "int8_weights"})
"""Formats that need training images."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What is needed to make quantized models of an exported one.

    Attributes:
        source: an ONNX file of float32.
        folder: where files are made.
        best: the checkpoint that ``source`` was made of.
        threads: of the CPU.
    """

    source: Path
    folder: Path
    best: BestModel
    threads: int

    def climb(self, formats: Sequence[str], judge: Judge, say: Say) -> tuple[str | None, list[dict[str, Any]]]:
        """Make one model after the other, of one format after the other, until one is accepted.

        Returns:
            The format that was, whose file then lies in the folder (None: there is none), and a row for each try.
        """
        rows: list[dict[str, Any]] = []
        for name in formats:
            for row in self._try(name, judge):
                rows.append(row)
                numbers = "" if row["agreement"] is None else f" agreement {row['agreement']:.4f}"
                say(f"{row['file']}: {row['rung']}:{numbers} {row['reason'] or 'accepted'}")
                if row["accepted"]:
                    return name, rows
        return None, rows

    def offer(self, tried: Sequence[dict[str, Any]], command: Sequence[str], say: Say) -> None:
        """Tell people how to try fine-tuning, where no int8 model passed that was made, and it can be tried.

        Args:
            tried: a row for each try.
            command: that did this.
            say: is given the line.
        """
        from launcher.tools.int8.torch_graph import unknown_nodes

        refused = [row for row in tried if row["format"] == "int8" and row["is_made"]]
        if not refused or any(row["accepted"] for row in refused) or self.best.recipe.post.qat_steps:
            return
        if unknown_nodes(self._prepared()):
            return
        again = shlex.join([*command, f"post.qat_steps={OFFERED_STEPS}"])
        say(f"{FILES['int8']}: fine-tuning may make one that passes, and takes minutes: {again}")

    def _try(self, name: str, judge: Judge) -> Iterator[dict[str, Any]]:
        file = self.folder / FILES[name]
        rungs = iter(self._rungs(name))
        while True:
            phases.at(f"making {file.name}")
            start = time.monotonic()
            row: dict[str, Any] = {"file": file.name, "format": name, "rung": name, "made_s": None}
            row |= {"agreement": None, "is_made": False}
            try:
                rung, model, settings = next(rungs)
                row["rung"] = rung
                _write(model, file, self.source, settings | {"rung": rung})
                row["made_s"] = time.monotonic() - start
                reason, measured = judge(name, file)
            except StopIteration:
                return
            except Exception as error:  # of a network that ONNX Runtime cannot quantize in this way
                traceback.print_exc()
                file.unlink(missing_ok=True)
                row["rung"] = getattr(error, "rung", row["rung"])
                yield row | {"reason": f"cannot be made: {first_line(error)}", "accepted": False}
                continue  # a generator that has raised is at its end
            yield row | measured | {"is_made": True, "reason": reason, "accepted": reason is None}

    def _rungs(self, name: str) -> Iterator[Rung]:
        ways = {"int8": self._int8, "int8_weights": self._int8_weights, "fp16": self._fp16}
        return (ways | {"int8_dynamic": self._int8_dynamic})[name]()

    def _int8(self) -> Iterator[Rung]:
        from launcher.tools.int8 import qat
        from launcher.tools.int8.rungs import Rungs

        post, batches = self.best.recipe.post, self._calibration_batches()
        bits, steps = weight_bits(post.target), post.qat_steps
        common = {"target": post.target, "weight_bits": bits, "activation_bits": 8}
        common |= {"calibration_images": sum(len(images) for images in batches)}

        def train(model: ModelProto, quantized: ModelProto) -> ModelProto:
            lesson = qat.Lesson(steps=steps, images=self.best.augmented(steps), teacher=self.best.module)
            return qat.train(model, quantized, lesson, bits=bits)

        rungs = Rungs(self._prepared(), batches, bits=bits, threads=self.threads, train=train if steps else None)
        for made in rungs:
            trained = {"qat_steps": steps} if made.rung == qat.RUNG else {}
            yield made.rung, made.model, common | made.settings | trained

    def _int8_weights(self) -> Iterator[Rung]:
        from launcher.tools.int8 import calibration, qdq, weights
        from launcher.tools.int8.graph import Graph

        graph, batches = Graph(self._prepared()), self._calibration_batches()
        qdq.correct_biases(graph, calibration.measure(graph.model, batches, threads=self.threads), bits=weights.BITS)
        settings = {"weight_bits": weights.BITS, "activation_bits": FLOAT_BITS}
        settings |= {"calibration_images": sum(len(images) for images in batches)}
        yield "weights", weights.compress(graph.model), settings

    def _calibration_batches(self) -> list[NDArray[np.float32]]:
        """Training images, N x C x S x S, the same ones every time."""
        indices = epoch_order(self.best.recipe.seed, 0, len(self.best.dataset("train")))[:NUM_CALIBRATION_IMAGES]
        return [
            part
            for images, _ in self.best.batches("train", indices.tolist())
            for part in np.array_split(images.numpy(), -(-len(images) // CALIBRATION_BATCH))
        ]

    def _fp16(self) -> Iterator[Rung]:
        import onnx

        model = onnx.load(self.source)
        _halve_weights(model)
        yield "weights", model, {"weights": "float16"}

    def _int8_dynamic(self) -> Iterator[Rung]:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        bits, file = weight_bits(self.best.recipe.post.target), self.folder / ".dynamic.onnx"
        quantize_dynamic(
            self._prepared(),
            file,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=bits == PORTABLE_BITS,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(file)
        file.unlink()
        if not any(node.op_type == "MatMulInteger" for node in model.graph.node):
            raise ValueError("it has no matrix products, as transformers have")
        yield "dynamic", model, {"target": self.best.recipe.post.target, "weight_bits": bits}

    def _prepared(self) -> ModelProto:
        """The float model with BatchNorm folded into its layers and the shapes of its tensors inferred."""
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        file = self.folder / ".prepared.onnx"
        quant_pre_process(self.source, file, skip_symbolic_shape=True)
        model = onnx.load(file)
        file.unlink()
        used = {node.domain for node in model.graph.node}
        for unused in [one for one in model.opset_import if one.domain and one.domain not in used]:
            model.opset_import.remove(unused)  # it may be one that other readers do not know
        return model


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _halve_weights(model: Any) -> None:
    """Keep weights as float16; they become float32 when the file is opened, so that it computes as fast as before."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) <= 1:
            continue
        with np.errstate(over="ignore"):
            half = numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(half).all():
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT, name=f"{name}_cast"))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def weight_bits(target_cpus: str) -> int:
    """Bits of the weights for ``post.target``: 7 where the CPUs meant may add products in 16 bits."""
    if target_cpus == "this":
        return PORTABLE_BITS if host_cpu.saturates_int8() else 8
    return {"portable": PORTABLE_BITS, "vnni": 8, "arm": 8}[target_cpus]


def _write(model: ModelProto, target: Path, source: Path, settings: dict[str, Any]) -> None:
    """Save a model with the metadata of the one it was made of, and how it was made."""
    import onnx

    known = read_metadata(onnx.load(source, load_external_data=False))
    onnx.helper.set_model_props(model, known | {QUANTIZATION: json.dumps(settings)})
    onnx.save(model, target)
