"""What a run is about to do, in a few lines before its first step."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch
import torchvision

import launcher
from launcher.engine import optim
from launcher.engine.device import cpu_name, num_cores
from launcher.engine.loading import balance
from launcher.engine.optimizing.groups import group_parameters
from launcher.recipe import phases
from launcher.system.words import plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.engine.setup import Parts

MOST_RATES = 4
"""More are not told one by one."""


def lines(parts: Parts) -> Iterator[str]:
    """Model, images, steps, learning and what is best; each a line for people."""
    recipe = parts.recipe
    yield f"model: {_model(parts)}"
    weighed = parts.weights is not None
    yield balance.describe(_train_images(parts), parts.images_per_class, recipe.data.balance, weighed=weighed)
    size = parts.preprocessing.image_size
    yield f"{len(parts.val_set):,} validation images; the model sees {size} x {size} px"
    yield f"steps: {_steps(parts)}"
    config, device = phases.phase_at(recipe, 0).optim, parts.device.torch_device.type
    yield f"learning: {config.name}, {_rates(parts)}, {config.schedule} schedule; {parts.precision} on {device}"
    stopping = recipe.train.early_stopping
    waits = (
        "" if stopping.patience is None else f"; stops {plural(stopping.patience, 'epoch')} after the last better one"
    )
    yield f"best by {stopping.metric}{waits}"


def facts(parts: Parts) -> dict[str, Any]:
    """What the start has found out of data, network and machine; numbers and names for programs."""
    total, frozen = _sizes(parts)
    batching = parts.schedule.batching
    device = parts.device
    return {
        "num_classes": len(parts.classes),
        "train_images": _train_images(parts),
        "val_images": len(parts.val_set),
        "parameters": total,
        "trainable_parameters": total - frozen,
        "global_batch_size": batching.global_batch_size,
        "steps_per_epoch": parts.schedule.steps_per_epoch,
        "precision": str(parts.precision),
        "device": torch.cuda.get_device_name(device.torch_device) if device.is_cuda else cpu_name(),
        "cores": num_cores(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "launcher": launcher.__version__,
        "commit": parts.run.read_launched().commit,
    }


def _train_images(parts: Parts) -> int:
    """Those that are learned from, whatever number of classes each has."""
    return len(parts.train_set) - len(parts.schedule.excluded)


def _sizes(parts: Parts) -> tuple[int, int]:
    """Parameters, and those of them that are frozen at first."""
    sizes = {name: parameter.numel() for name, parameter in parts.model.module.named_parameters()}
    return sum(sizes.values()), sum(sizes[name] for name in parts.model.frozen_parameters(epoch=0))


def _model(parts: Parts) -> str:
    config = parts.recipe.model
    total, frozen = _sizes(parts)
    learn = "all learn" if not frozen else f"{total - frozen:,} of them learn"
    every = phases.phases(parts.recipe)
    if len(every) > 1:
        learn += f" in the first of {len(every)} phases (epochs 1 to {every[1].start})"
    weights = f"weights {config.weights}" if config.weights else "random weights"
    return f"{config.factory or config.arch}, {weights}, {plural(total, 'parameter')}, {learn}"


def _rates(parts: Parts) -> str:
    """The peak rates of what learns at first: of a few groups each, of more the highest and the lowest."""
    config, frozen = phases.phase_at(parts.recipe, 0).optim, parts.model.frozen_parameters(epoch=0)
    scale = optim.lr_scale(config, parts.schedule.batching.global_batch_size)
    peaks: dict[str, float] = {}
    for group in group_parameters(parts.model, config):
        if not frozen.issuperset(group["names"]):
            peaks[group["name"]] = group["peak_lr"] * scale
    told = [f"{peak:.3g} ({name})" for name, peak in sorted(peaks.items(), key=lambda each: -each[1])]
    if len(set(peaks.values())) == 1:
        return f"rate {next(iter(peaks.values())):.3g}"
    return f"rates {', '.join(told) if len(told) <= MOST_RATES else f'{told[0]} to {told[-1]}'}"


def _steps(parts: Parts) -> str:
    batching, epochs = parts.schedule.batching, parts.recipe.train.epochs
    least, most = min(batching.batch_sizes), max(batching.batch_sizes)
    each = f"{least}" if least == most else f"{least} to {most}"
    ranks = plural(len(batching.batch_sizes), "rank")
    whole = f"{batching.global_batch_size} images each, {each} at once on {ranks}"
    return f"{parts.num_steps:,} of {whole}; {parts.schedule.steps_per_epoch:,} an epoch, {plural(epochs, 'epoch')}"
