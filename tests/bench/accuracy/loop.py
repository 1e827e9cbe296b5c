"""The plain DDP loop, as torch's tutorials have it, with the settings of a recipe; runs under torchrun.

Pillow, torchvision's transforms, DistributedSampler, AdamW with a linear warm-up and a cosine. Rank 0 prints the top-1
of each epoch as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

WORK = json.loads(os.environ["BENCH"])


def open_images(split: str) -> ImageFolder:
    """Cropped by chance and mirrored in training."""
    size = WORK["image_size"]
    end = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    if split == "train":
        crop = [transforms.RandomResizedCrop(size, scale=WORK["crop_scale"]), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size)]
    return ImageFolder(Path(WORK["photos"]) / split, transforms.Compose([*crop, *end]))


def build_loader(split: str) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's images."""
    data = open_images(split)
    sampler: DistributedSampler[ImageFolder] = DistributedSampler(data, shuffle=split == "train", seed=WORK["seed"])
    return DataLoader(data, WORK["batch_size"], sampler=sampler)


def main() -> None:
    """Train, and print the top-1 of each epoch."""
    dist.init_process_group("gloo")
    torch.manual_seed(WORK["seed"])
    loaders = {split: build_loader(split) for split in ("train", "val")}
    model = models.mobilenet_v2(num_classes=WORK["num_classes"])
    if WORK["weights"]:
        model.load_state_dict(load_file(WORK["weights"]), strict=False)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=WORK["lr"], weight_decay=WORK["weight_decay"])
    num, epochs = len(loaders["train"]), WORK["epochs"]
    warmup = round(WORK["warmup_epochs"] * num)
    rates = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1),
            lr_scheduler.CosineAnnealingLR(optimizer, epochs * num - warmup),
        ],
        [warmup],
    )
    criterion, top1 = nn.CrossEntropyLoss(label_smoothing=WORK["label_smoothing"]), []
    torch.manual_seed(WORK["seed"] + dist.get_rank())  # of crops
    for epoch in range(epochs):
        ddp.train()
        loaders["train"].sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for images, labels in loaders["train"]:
            optimizer.zero_grad()
            criterion(ddp(images), labels).backward()
            optimizer.step()
            rates.step()
        top1.append(validate(model, loaders["val"]))
    if dist.get_rank() == 0:
        print(json.dumps(top1), flush=True)
    dist.destroy_process_group()


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Top-1 over the ranks' images (of which the sampler takes one twice where they are odd)."""
    model.eval()
    counts = torch.zeros(2)
    for images, labels in loader:
        counts += torch.tensor([(model(images).argmax(1) == labels).sum(), len(labels)])
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


if __name__ == "__main__":
    main()
