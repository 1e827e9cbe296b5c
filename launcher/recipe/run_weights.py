"""Weights that a run of one's own has left: ``model.weights: runs/NAME``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

AVERAGES = ("ema", "swa")
"""Kinds of averaged weights by their keys in ``train``: what names of their metrics begin with, as in ema_top1, and
what the best value's ``weights`` says where it is theirs."""


def is_run(folder: Path) -> bool:
    """Whether a folder is the run directory of a run."""
    return (folder / "plan.json").is_file() and (folder / "recipe.yaml").is_file()


def best_of_run(folder: Path) -> Path | None:
    """The file with the weights of a run's best checkpoint; None: the folder is no run, or has none yet.

    They are the average's (train.ema, train.swa) where it is they that were best.
    """
    if not is_run(folder):
        return None
    checkpoint = (folder / "checkpoints" / "best").resolve()
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        best = state["early_stopping"]["best"] or {}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    average, model = checkpoint / "ema.safetensors", checkpoint / "model.safetensors"
    return average if best.get("weights") in AVERAGES and average.is_file() else model


def classes_of(weights: Path) -> list[str] | None:
    """The classes, in the order of the logits, that a checkpoint of a run was trained for; None: it is no such file."""
    try:
        state = json.loads((weights.parent / "state.json").read_text(encoding="utf-8"))
        classes = state["classes"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return list(classes) if isinstance(classes, list) else None
