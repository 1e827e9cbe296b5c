"""What Grad-CAM shows of a network that looks at one place alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from launcher.errors import UsageError
from launcher.tools import explain


class Corner(torch.nn.Module):
    """Class 1 is the brightness of the upper left quarter."""

    def __init__(self, channels=3):
        super().__init__()
        self.map = torch.nn.Conv2d(channels, 1, 4, stride=4)
        torch.nn.init.constant_(self.map.weight, 1.0)
        torch.nn.init.zeros_(self.map.bias)

    def forward(self, images):
        found = self.map(images)
        return torch.stack([0 * found.mean((1, 2, 3)), found[..., :4, :4].mean((1, 2, 3))], dim=1)


def test_the_map_is_hot_where_the_picture_is_bright():
    captum = pytest.importorskip("captum.attr")
    net = Corner().eval()
    layer = explain.last_map(net, 32, 3)
    assert layer is net.map
    made = explain.Explainer.__new__(explain.Explainer)
    made._classes, made._stretch = ["other", "corner"], captum.LayerAttribution.interpolate
    made._grad_cam = captum.LayerGradCam(net, layer)
    image = np.zeros((3, 32, 32), np.float32)
    image[:, 4:12, 4:12] = 1
    heat = made.heat(image, "corner")
    assert (heat.shape, heat.max()) == ((32, 32), 1.0)
    assert heat[4:12, 4:12].mean() > 0.7  # between the points of the map it is interpolated
    assert heat[16:, 16:].max() == 0


def test_a_grey_picture_is_drawn_beside_its_map(tmp_path):
    captum = pytest.importorskip("captum.attr")
    net = Corner(channels=1).eval()
    made = explain.Explainer.__new__(explain.Explainer)
    made._classes, made._stretch = ["other", "corner"], captum.LayerAttribution.interpolate
    made._grad_cam = captum.LayerGradCam(net, explain.last_map(net, 32, 1))
    made._settings, made._folder, made._names = SimpleNamespace(mean=(0.5,), std=(0.25,)), tmp_path, set()
    image = np.full((1, 32, 32), -2, np.float32)
    image[:, 4:12, 4:12] = 2
    with Image.open(made.draw("photo.png", image, "corner")) as drawn:
        assert (drawn.mode, drawn.size) == ("RGB", (2 * 32 + explain.GAP, 32))
        assert drawn.getpixel((8, 8)) == (255, 255, 255)
        assert drawn.getpixel((24, 24)) == (0, 0, 0)


def test_a_network_without_a_map_is_refused():
    with pytest.raises(UsageError, match="no layer of this network gives a map"):
        explain.last_map(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2)), 8, 3)
