"""A network that gives NaN for batches with an all-white image; runs name it as `model.factory`."""

from __future__ import annotations

import torch
from torchvision.models import ShuffleNetV2


class Spoilt(ShuffleNetV2):
    """shufflenet_v2_x0_5."""

    def __init__(self, num_classes):
        super().__init__([4, 8, 4], [24, 48, 96, 192, 1024], num_classes=num_classes)

    def forward(self, images):
        white = (images.amin(dim=(1, 2, 3)) > 2).any()  # the darkest value of white, normalised, is 2.2
        return super().forward(images) * torch.where(white, torch.nan, 1.0)
