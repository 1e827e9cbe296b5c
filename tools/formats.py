"""The formats that a checkpoint is exported to: one row each, how it is written and how it is opened again."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.model import build_module
from launcher.engine.network.fitting import load_state
from launcher.recipe import load as recipes
from launcher.tools import baked, onnx_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launcher.tools.evaluate import BestModel, Predictor

    Say = Callable[[str], None]
    """Tells the person at the terminal a line."""

BAKED = "onnx_baked"
"""The format that post.bake_preprocessing asks for."""
LARGE_BYTES = 1.9e9
"""Above this, ONNX keeps weights beside the model: a protobuf holds at most 2 GB."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write a model."""

    file: str
    """Its name in exports/."""
    write: Callable[[Path, BestModel], None]
    """Makes the file."""
    is_weights: bool = False
    """It holds weights alone: to compute with them takes the model's code."""
    deprecated: str | None = None
    """Why it should not be chosen any more; None: it may."""


def facts(best: BestModel) -> dict[str, str]:
    """What an exported file says of itself, each value as JSON."""
    found = {
        "classes": best.classes,
        "preprocessing": best.preprocessing.describe(),
        onnx_model.INDEPENDENT: best.independent,
        "recipe": recipes.to_dict(best.recipe),
        "checkpoint": {"step": best.state["step"], "sha256": weights_hash(best)},
        "weights": {"started_from": best.recipe.model.weights, "licence": licence(best)},
    }
    if best.threshold is not None:
        found[onnx_model.THRESHOLD] = best.threshold
    if best.temperature != 1.0:
        found[onnx_model.TEMPERATURE] = best.temperature
    return {key: json.dumps(value) for key, value in found.items()}


def weights_hash(best: BestModel) -> str:
    """SHA-256 of the checkpoint's file of weights."""
    with (best.folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def licence(best: BestModel) -> str | None:
    """What is known of the licence of the weights that training started from; None: they were random."""
    model = best.recipe.model
    if model.weights is None:
        return None
    if model.factory is None and model.weights.isidentifier() and not model.weights.islower():
        return (
            "torchvision's own weights: see github.com/pytorch/vision, and the terms of the data set they learnt from"
        )
    return "of whoever made them"


def example(best: BestModel) -> torch.Tensor:
    """Two images: a batch of one would be exported as just that."""
    settings = best.preprocessing
    return torch.zeros(2, settings.channels, settings.image_size, settings.image_size)


def dynamic_batch() -> Any:
    """The shapes of :func:`example` whose first dimension may be any."""
    return ({0: torch.export.Dim("batch")},)


def write_onnx(target: Path, best: BestModel) -> None:
    """Write ONNX: ``images`` (float32 N x 3 x S x S, normalised, any N) to ``logits`` (float32 N x C)."""
    import onnx

    size = sum(p.numel() * p.element_size() for p in best.module.parameters())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations: the user can do nothing about them
        torch.onnx.export(
            best.module,
            (example(best),),
            target,
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=dynamic_batch(),
            external_data=size > LARGE_BYTES,
            verbose=False,
        )
    model = onnx.load(target, load_external_data=False)
    onnx.helper.set_model_props(model, facts(best))
    onnx.save(model, target)


def write_onnx_baked(target: Path, best: BestModel) -> None:
    """Write ONNX that does the preprocessing itself, of the ONNX file beside it where there is one.

    Raises:
        ValueError: images are made by the user's own code.
    """
    import onnx

    preprocessing = best.preprocessing.describe()
    if "transform" in preprocessing:
        own = preprocessing["transform"]
        raise ValueError(f"images are made by the user's own code, {own}, which a graph cannot hold")
    source = target.with_name(FORMATS["onnx"].file)
    if not source.exists():
        source = target.with_name(".plain.onnx")
        write_onnx(source, best)
    model = baked.bake(onnx.load(source), preprocessing, independent=best.independent, temperature=best.temperature)
    onnx.save(model, target)


def write_torch_export(target: Path, best: BestModel) -> None:
    """Write torch.export's ``.pt2``."""
    torch.export.save(_exported(best), target, extra_files=facts(best))


def write_torchscript(target: Path, best: BestModel) -> None:
    """Write TorchScript by tracing."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(best.module, example(best))  # type: ignore[no-untyped-call]
        torch.jit.save(traced, str(target), _extra_files=facts(best))


def write_state_dict(target: Path, best: BestModel) -> None:
    """Write the weights alone, for ``torch.load(…, weights_only=True)``."""
    torch.save(best.module.state_dict(), target)


def write_safetensors(target: Path, best: BestModel) -> None:
    """Write the weights alone as safetensors, with what they are."""
    from safetensors.torch import save_file

    tensors = {name: tensor.clone().contiguous() for name, tensor in best.module.state_dict().items()}
    save_file(tensors, target, metadata=facts(best))


def write_aotinductor(target: Path, best: BestModel) -> None:
    """Write a package that torch's inductor has compiled for this machine's CPU."""
    with torch.inference_mode():
        torch._inductor.aoti_compile_and_package(_exported(best), package_path=str(target))  # noqa: SLF001  its public name


def _exported(best: BestModel) -> torch.export.ExportedProgram:
    return torch.export.export(best.module, (example(best),), dynamic_shapes=dynamic_batch())


FORMATS = {
    "onnx": Format(file="model.onnx", write=write_onnx),
    BAKED: Format(file="model.baked.onnx", write=write_onnx_baked),
    "torch_export": Format(file="model.pt2", write=write_torch_export),
    "torchscript": Format(
        file="model.ts",
        write=write_torchscript,
        deprecated="torch calls it deprecated; onnx and torch_export follow it",
    ),
    "state_dict": Format(file="model.pth", write=write_state_dict, is_weights=True),
    "safetensors": Format(file="model.safetensors", write=write_safetensors, is_weights=True),
    "aotinductor": Format(file="model.aoti.pt2", write=write_aotinductor),
}


def open_export(name: str, path: Path, best: BestModel, *, threads: int, warn: Say) -> Predictor:
    """A file as a function from images to logits.

    Args:
        name: of its format.
        path: the file.
        best: the checkpoint it was made of, whose code weights alone need.
        threads: of an ONNX file.
        warn: gets a line if the file was made for other CPUs than this one.
    """
    if path.suffix == ".onnx":
        return onnx_model.onnx_predictor(path, threads=threads, warn=warn)
    if not FORMATS[name].is_weights:
        return open_program(path)
    settings, num = best.preprocessing, len(best.classes)
    module = build_module(
        best.recipe.model, num_classes=num, image_size=settings.image_size, channels=settings.channels
    )
    load_state(module, _read_weights(path))
    return module.eval()


def open_program(path: Path) -> Predictor:
    """A file of torch's that computes without the model's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.name == FORMATS["torchscript"].file:
            scripted: Predictor = torch.jit.load(str(path)).eval()  # type: ignore[no-untyped-call]
            return scripted
        if path.name == FORMATS["aotinductor"].file:
            compiled: Predictor = torch._inductor.aoti_load_package(str(path))  # noqa: SLF001  its public name
            return compiled
        exported: Predictor = torch.export.load(path).module()
        return exported


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".pth":
        found: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return found
    from safetensors.torch import load_file

    return load_file(path)
