"""What several files of tests of the trainer share."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from launcher.engine.data import read_image
from launcher.engine.schedule import Batching

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
UNEVEN = Batching(batch_sizes=(1, 5, 3), shares=(1, 5, 3), global_batch_size=18)


def moved(one, other, prefix=""):
    """Names of tensors that are not the same in two states."""
    return {name for name in one if name.startswith(prefix) and not torch.equal(one[name], other[name])}


def sound_weights(folder, path, arch="shufflenet_v2_x0_5"):
    """Of a model with BatchNorm whose statistics are those of the training images, so that its predictions differ."""
    torch.manual_seed(0)
    module = models.get_model(arch, weights=None, num_classes=7)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        module(torch.stack([(read_image(str(file)) / 255 - MEAN) / STD for file in folder.glob("train/*/*.png")]))
    save_file(module.state_dict(), path)
    return module.eval()
