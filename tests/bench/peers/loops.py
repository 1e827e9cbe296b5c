"""The peers' training, on one rank, as their documentation writes it; runs in the peers' environment under torchrun.

Rank 0 notes when each optimizer step ended.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

WORK = json.loads(os.environ["BENCH"])
RATE, MOMENTUM, DECAY = 0.01, 0.9, 1e-4


def note_steps() -> None:
    """Have each step's end written down."""
    if os.environ.get("RANK", "0") == "0":
        stamps = Path(os.environ["STAMPS"]).open("a", buffering=1)  # noqa: SIM115  to the process's end
        register_optimizer_step_post_hook(lambda *_: stamps.write(f"{time.time()}\n"))


def build_model(num_classes: int) -> nn.Module:
    """torchvision's, with random weights; head-only: the rest is frozen and in eval mode."""
    model = models.get_model(WORK["model"], num_classes=num_classes)
    if WORK["head_only"]:
        model.requires_grad_(False)
        head = next(layer for layer in reversed([*model.modules()]) if isinstance(layer, nn.Linear))
        head.requires_grad_(True)
    return model


def set_mode(model: nn.Module) -> None:
    """Training mode, but for what is frozen."""
    model.train(not WORK["head_only"])


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """As ours."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(learning, lr=RATE, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)


def open_images() -> ImageFolder:
    """Pillow and torchvision's transforms."""
    crop = transforms.RandomResizedCrop(WORK["px"], scale=(0.25, 1.0))
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize])
    return ImageFolder(Path(WORK["data"]) / "train", transform)


def build_loader(data: ImageFolder, **options: Any) -> DataLoader[Any]:
    """Its processes live through the epochs."""
    workers = WORK["workers"]
    return DataLoader(data, WORK["batch"], num_workers=workers, persistent_workers=workers > 0, **options)


def ddp() -> None:
    """torch's own tutorial."""
    torch.distributed.init_process_group("gloo")
    data = open_images()
    sampler: DistributedSampler[Any] = DistributedSampler(data)
    loader = build_loader(data, sampler=sampler)
    model = nn.parallel.DistributedDataParallel(build_model(len(data.classes)))
    optimizer, criterion = build_optimizer(model), nn.CrossEntropyLoss()
    set_mode(model)
    for epoch in range(WORK["epochs"]):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()
    torch.distributed.destroy_process_group()


def accelerate() -> None:
    """Its quick tour."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    data = open_images()
    built = build_model(len(data.classes))
    prepared = accelerator.prepare(built, build_optimizer(built), build_loader(data, shuffle=True))
    model, optimizer, loader = prepared
    criterion = nn.CrossEntropyLoss()
    set_mode(model)
    for _ in range(WORK["epochs"]):
        for images, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(criterion(model(images), labels))
            optimizer.step()
    accelerator.end_training()


def lightning() -> None:
    """Its Trainer, without logger, checkpoints and progress bar."""
    from lightning import LightningModule, Trainer

    data = open_images()

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model(len(data.classes))
            self.criterion = nn.CrossEntropyLoss()

        def on_train_epoch_start(self) -> None:
            set_mode(self.model)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            images, labels = batch
            loss: torch.Tensor = self.criterion(self.model(images), labels)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build_optimizer(self.model)

    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="ddp",
        max_epochs=WORK["epochs"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), build_loader(data, shuffle=True))


def timm() -> None:
    """Its train script, as it is; its arguments follow. (On a CPU it names the device to DDP, which refuses that.)"""
    init = nn.parallel.DistributedDataParallel.__init__

    def without_devices(self: Any, module: nn.Module, device_ids: Any = None, **options: Any) -> None:
        init(self, module, **options)

    nn.parallel.DistributedDataParallel.__init__ = without_devices
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    note_steps()
    {"ddp": ddp, "accelerate": accelerate, "lightning": lightning, "timm": timm}[sys.argv[1]]()
