"""Nets as small as can be, with all that a step changes: for tests that are not about a model."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import nn

NET, PLAIN, ONE_PIXEL, MATRICES = (
    {"factory": f"{__name__}:{name}"} for name in ("Net", "Plain", "OnePixel", "Matrices")
)
"""Sections of a recipe."""
FACTORY, SLOW = (f"model.factory={Path(__file__)}:{name}" for name in ("Net", "Slow"))
"""Changes of a recipe on the command line."""
PAUSE_S = 0.2


def block(num_in, num_out, stride):
    """As in mobilenet_v3, whose running statistics are slow, too."""
    convolution = nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(num_out, momentum=0.01), nn.ReLU())


class Net(nn.Module):
    """Four blocks with BatchNorm, and a head with dropout."""

    def __init__(self, num_classes):
        super().__init__()
        self.features = nn.Sequential(block(3, 8, 4), block(8, 8, 2), block(8, 16, 2), block(16, 16, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, num_classes))

    def forward(self, images):
        return self.classifier(self.features(images).mean((2, 3)))


class Plain(nn.Module):
    """Convolutions without BatchNorm, and a head with dropout: how a batch is divided changes only rounding."""

    def __init__(self, num_classes):
        super().__init__()
        widths, strides = (3, *[8] * 13), {0: 2, 4: 2, 8: 2}
        layers = [nn.Conv2d(widths[i], 8, 3, stride=strides.get(i, 1), padding=1) for i in range(13)]
        for layer in layers:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        self.features = nn.Sequential(*(nn.Sequential(layer, nn.ReLU()) for layer in layers))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(8, num_classes))

    def forward(self, images):
        return self.classifier(self.features(images).mean((2, 3)))


class OnePixel(nn.Module):
    """The last five of its BatchNorms see one pixel of an image of 32 px, as those of large networks do."""

    def __init__(self, num_classes):
        super().__init__()
        convolutions = [nn.Conv2d(3 if i == 0 else 16, 16, 3, stride=1 + (i < 5), padding=1) for i in range(9)]
        self.features = nn.Sequential(*(nn.Sequential(one, nn.BatchNorm2d(16), nn.ReLU()) for one in convolutions))
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


class Matrices(Net):
    """With a hidden layer that is a matrix, which muon takes."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.classifier = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, num_classes))


class Slow(Net):
    """The same bits, but the steps of the first attempts leave a test the time to do something to the run."""

    def __init__(self, num_classes, attempts=1):
        super().__init__(num_classes)
        self.attempts = attempts

    def forward(self, images):
        if self.training and int(os.environ.get("LAUNCH_ATTEMPT", "0")) in range(1, self.attempts + 1):
            time.sleep(PAUSE_S)
        return super().forward(images)
