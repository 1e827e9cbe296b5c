"""The model of own_model.yaml: copy it, and write your own."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    import torch


class SmallNet(nn.Module):
    """Four blocks of convolution, BatchNorm and ReLU, and a linear head.

    Args:
        num_classes: outputs.
        width: channels of the first block; each of the others has twice as many as the one before.
    """

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width, 8 * width]
        blocks = [
            nn.Sequential(nn.Conv2d(one, other, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(other), nn.ReLU())
            for one, other in pairwise(sizes)
        ]
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, N x C, of images, N x 3 x H x W."""
        found: torch.Tensor = self.head(self.features(images).mean((2, 3)))
        return found
