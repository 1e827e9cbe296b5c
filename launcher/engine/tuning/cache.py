"""Keeps measured batch sizes for later runs of the same kind on the same kind of device."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torchvision

from launcher.engine.tuning.probe import BATCHES_HELD
from launcher.images import folder as image_folder
from launcher.recipe import phases, user_code
from launcher.runs.user_code import digest_of
from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.engine.distributed import Ranks
    from launcher.engine.loading.data_sets import DataSets
    from launcher.engine.tuning.rank_probes import DeviceFacts
    from launcher.recipe.schema import Recipe

SAME_BUDGET = 0.05
"""Use an entry if the memory differs from the measured one by at most this fraction."""


def key(recipe: Recipe, facts: DeviceFacts, data_sets: DataSets, ranks: Ranks, max_size: int) -> str:
    """Digest of everything that speed, memory and the search depend on."""
    code = digest_of(recipe)
    recipe = user_code.rewrite(recipe, lambda _, text: user_code.as_in_run(text))  # wherever the run is
    model = asdict(recipe.model)
    for key in ("weights", "freeze", "unfreeze"):
        del model[key]
    values = {
        "device": [facts.name, facts.total_bytes],
        "model": model,
        "classes": len(data_sets.train.classes),
        "image_size": data_sets.preprocessing.image_size,
        "precision": facts.precision,
        "channels_last": [recipe.train.channels_last, facts.channels_last],
        "optimizer": [recipe.optim.name, *(phase.optim.momentum > 0 for phase in phases.phases(recipe))],
        "loss": [recipe.train.loss, recipe.train.loss_args],
        "code": code,
        "clip": [recipe.train.clip_grad_norm is not None, recipe.train.clip_grad_value is not None],
        "average": recipe.train.ema is not None or recipe.train.swa is not None,
        "mix": [recipe.data.mixup > 0, recipe.data.cutmix > 0],
        "freezings": [[*phase.freeze, "but", *phase.learn] for phase in phases.phases(recipe)],
        "batch": [recipe.batch.objective, max_size],
        "role": [ranks.rank == 0, ranks.world_size > 1, ranks.local_world_size],
        "cores": [recipe.data.workers, recipe.launch.threads],
        "batches_held": BATCHES_HELD,
        "allocator": recipe.launch.keep_freed_memory,
        "versions": [importlib.metadata.version("finetune-launcher"), torch.__version__, torchvision.__version__],
    }
    return _digest(values)


def loading_key(recipe: Recipe, data_sets: DataSets) -> str:
    """Of what the speed of loading depends on besides: how cores are best shared follows from it."""
    data = recipe.data
    augmented = [
        data.augment,
        data.crop_scale,
        data.flip,
        data.rotate,
        data.auto_augment,
        data.color_jitter,
        data.erase,
        data.decode,
        data.cache,
    ]
    return _digest([data.path, data_sets.train.digest, augmented])


def read(found_key: str, budget_bytes: int) -> dict[str, Any] | None:
    """The stored result, if there is as much memory now as there was then."""
    try:
        found: dict[str, Any] = json.loads(_file(found_key).read_text(encoding="utf-8"))
        near = abs(budget_bytes / found["budget_bytes"] - 1) <= SAME_BUDGET
        fits = near and found["needed_bytes"] <= budget_bytes
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):  # no file, or one of something else
        return None
    return found if fits else None


def write(found_key: str, report: dict[str, Any]) -> None:
    """Store a result; do nothing if the cache cannot be written."""
    with contextlib.suppress(OSError):
        _file(found_key).parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(_file(found_key), report)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _file(found_key: str) -> Path:
    return image_folder.cache_dir() / "batch-sizes" / f"{found_key}.json"
