"""From a recipe file to a distributed fine-tuning job and a measured, exported model.

``launcher.load("runs/x").predict(["a.jpg"])`` uses what came of it (:mod:`launcher.tools.trained_model`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from launcher.tools.trained_model import TrainedModel

__version__ = "0.1.0"


def load(path: str | os.PathLike[str], *, many: bool = False) -> TrainedModel:
    """Open a trained model: a run directory, or an ONNX file that was exported from one.

    Args:
        path: of either.
        many: each core computes images of its own: quicker for many images, slower for one.
    """
    from launcher.tools import trained_model

    return trained_model.load(path, many=many)
