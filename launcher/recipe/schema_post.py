"""The schema of a recipe's ``post``: what becomes of the best checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from launcher.recipe.types import STRICT, CountOrZero, Fraction, NonNegative


@dataclass(frozen=True, kw_only=True)
class PostConfig:
    """What becomes of the best checkpoint."""

    __pydantic_config__ = STRICT

    enabled: bool = True
    """Export, quantize, measure and report after training."""
    export: list[Literal["onnx", "torch_export", "torchscript", "state_dict", "safetensors", "aotinductor"]] = field(
        default_factory=lambda: ["onnx"]
    )
    """Formats; state_dict and safetensors are the weights alone, aotinductor needs a C++ compiler, torchscript is
    deprecated by torch itself."""
    quantize: list[Literal["int8", "int8_weights", "fp16", "int8_dynamic"]] = field(
        default_factory=lambda: ["int8", "fp16"]
    )
    """Quantized formats, made from onnx: they are tried in this order, each in several ways, until one is accepted.
    int8_weights: weights alone, a quarter of the size; fp16: the same, half the size; int8_dynamic: transformers."""
    qat_steps: CountOrZero = 0
    """The last way to int8, where no other was accepted: fine-tuning while weights and activations are rounded, by so
    many steps of 32 training images, towards the checkpoint's own logits. 0: none, for it takes minutes on a CPU."""
    bake_preprocessing: bool = False
    """Make model.baked.onnx too: uint8 N x H x W x 3 of any size in, probabilities out; resize, crop, normalisation and
    softmax (or sigmoid) are in its graph."""
    calibrate: Literal["none", "temperature"] = "none"
    """temperature: one number is fitted on the validation images, by which predictions divide logits so that their
    probabilities are as often right as they say; it stands in the exports' metadata. The likeliest class stays."""
    profile: str | None = None
    """On SLURM: a profile on which the exports are made by a job of their own, after the training; null: in the same
    job, by its first node. Elsewhere it means nothing."""
    max_top1_drop: NonNegative = 1.0
    """Points (hundredths) of validation top-1 that an exported model may lose and still be accepted: it is refused if
    the 95 % interval of its loss, image by image beside the checkpoint, lies above."""
    min_agreement: Fraction = 0.97
    """Least fraction of the validation images for which an exported model must name the checkpoint's class to be
    accepted (a float32 one always 0.99): mistakes that come and go in equal numbers do not show in top-1."""
    target: Literal["portable", "this", "vnni", "arm"] = "portable"
    """CPUs that int8 models are for. portable: all (weights of 7 bits); vnni, arm: x86 with VNNI (Ice Lake, Zen 4,
    later) and ARM (8 bits; wrong answers on other x86); this: as the CPU that makes them."""
