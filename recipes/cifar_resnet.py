"""The model of cifar10.yaml: copy it, and write your own."""

from __future__ import annotations

from torch import nn
from torchvision import models


def resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 for images of 32 pixels, which its usual stem would leave 8 of before the first block.

    The first convolution is of 3 x 3 pixels with stride 1, as He et al. (2016, section 4.2) have it for CIFAR-10, and
    there is no max pooling.

    Args:
        num_classes: outputs.
    """
    net: nn.Module = models.resnet18(weights=None, num_classes=num_classes)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net
