"""What people type for a key of the recipe: its last part alone, or what other tools call it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from launcher.recipe import values as recipe_types

if TYPE_CHECKING:
    from collections.abc import Iterator

ELSEWHERE = {
    "optim.lr": ("learning_rate", "learningrate", "lr0", "base_lr", "init_lr", "max_lr"),
    "optim.name": ("optimizer", "opt", "optimiser"),
    "optim.weight_decay": ("wd", "decay"),
    "optim.schedule": ("scheduler", "lr_scheduler", "lr_scheduler_type", "sched"),
    "optim.warmup_epochs": ("warmup", "warmup_steps", "warmup_ratio", "lr_warmup_epochs"),
    "optim.groups": ("param_groups", "lrs"),
    "batch.size": (
        "batch",
        "batch_size",
        "batchsize",
        "bs",
        "per_device_train_batch_size",
        "train_batch_size",
    ),
    "batch.global_size": ("global_batch_size", "total_batch_size", "effective_batch_size"),
    "batch.accumulate": (
        "accumulation_steps",
        "accumulate_grad_batches",
        "grad_accum",
        "grad_accum_steps",
        "gradient_accumulation_steps",
    ),
    "train.epochs": ("epoch", "num_epochs", "max_epochs", "n_epochs", "num_train_epochs"),
    "train.loss": ("criterion", "loss_fn"),
    "train.label_smoothing": ("smoothing", "label_smoothing_factor"),
    "train.clip_grad_norm": ("clip_grad", "max_grad_norm", "gradient_clip_val", "grad_clip"),
    "train.early_stopping.patience": ("early_stopping_patience",),
    "train.early_stopping.metric": ("monitor", "metric_for_best_model"),
    "train.checkpoint.every_steps": ("save_steps", "checkpoint_interval"),
    "train.checkpoint.keep": ("save_total_limit", "save_top_k"),
    "model.arch": ("model_name", "architecture", "backbone", "network"),
    "model.weights": ("pretrained", "checkpoint_path", "weights_path"),
    "model.num_classes": ("num_labels", "nclasses"),
    "model.freeze": ("freeze_layers", "frozen"),
    "data.path": ("data_dir", "data_path", "dataset_dir", "root", "data_root"),
    "data.name": ("dataset_name",),
    "data.image_size": ("img_size", "imgsz", "input_size", "resolution", "image_resolution"),
    "data.augment": ("augmentation", "augmentations", "aug"),
    "data.workers": ("num_workers", "dataloader_num_workers", "loader_workers"),
    "precision": ("amp", "fp16", "bf16", "mixed_precision", "dtype"),
    "tracking.wandb.mode": ("wandb_mode",),
    "tracking.wandb.project": ("wandb_project",),
    "tracking.log_every": ("log_interval", "logging_steps", "log_every_n_steps", "print_freq"),
    "launch.procs": ("nproc_per_node", "num_processes", "nprocs", "ranks"),
    "launch.gpus": ("num_gpus", "gpus_per_node", "devices", "ngpus"),
    "launch.nodes": ("num_nodes", "nnodes", "num_machines"),
    "launch.device": ("accelerator",),
}
"""Keys, with what timm, Lightning, accelerate, transformers, Ultralytics and torchrun call them."""


def keys_of(name: str, schema: type) -> list[str]:
    """The dotted keys of ``schema`` that ``name`` may stand for: those that end in it, else what it is elsewhere."""
    name = name.replace("-", "_").lower()
    known = list(leaves(schema))
    if name in known:
        return [name]
    ending = [key for key in known if key.rpartition(".")[2] == name]
    elsewhere = [key for key, names in ELSEWHERE.items() if name in names and key in known]
    return ending or elsewhere


def leaves(schema: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of ``schema`` that hold a value."""
    for field in dataclasses.fields(schema):
        key = f"{prefix}{field.name}"
        section = recipe_types.at(schema, [field.name])
        if dataclasses.is_dataclass(section):
            yield from leaves(section, f"{key}.")
        else:
            yield key
