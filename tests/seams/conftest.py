"""A project of a user's, with code of its own beside the recipe, and `launch` run in it as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.runs.run_dir import RunDir
from tests import warm

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PATH": "", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

FILES = {
    "blocks.py": """
from torch import nn


def block(num_in, num_out):
    return nn.Sequential(nn.Conv2d(num_in, num_out, 3, stride=2, padding=1), nn.BatchNorm2d(num_out), nn.ReLU())
""",
    "net.py": """
import random

import torch
from torch import nn

from blocks import block


class Net(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.body = block(3, width)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images):
        scale = 1 + 0.1 * random.random() if self.training else 1
        return self.fc(self.drop(self.body(images * scale).mean((2, 3))))
""",
    "shapes.py": """
import os
import random
import time

from PIL import Image, ImageDraw


class Shapes:
    classes = ["circle", "square", "triangle"]

    def __init__(self, split, num=48):
        self.split, self.num = split, num if split == "train" else 12

    def __len__(self):
        return self.num

    def key(self, i):
        return f"{self.split}/{i:03d}"

    def label(self, i):
        return i % 3

    def __getitem__(self, i):
        time.sleep(float(os.environ.get("SLOW_S", "0")))
        image = Image.new("RGB", (40, 36), "white")
        draw, x = ImageDraw.Draw(image), 4 + random.randrange(9)
        draw.regular_polygon((x + 10, x + 10, 10), (24, 4, 3)[i % 3], fill=(0, 80 * (i % 3), 0))
        return image, i % 3
""",
    "augment.py": """
import random

import numpy as np
import torch
from torchvision import transforms


def make(train, image_size, mean, std):
    steps = [transforms.Resize((image_size, image_size)), transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose([transforms.RandomHorizontalFlip(), *steps, noise] if train else steps)


def noise(image):
    return image + 0.1 * random.random() * torch.randn(image.shape) + 0.01 * float(np.random.rand())
""",
    "losses.py": """
from torch.nn import functional


def soft(logits, targets, power=1.0):
    right = functional.softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]
    return functional.cross_entropy(logits, targets, reduction="none") * (1 - right) ** power
""",
    "recipe.yaml": """
model: {factory: "net.py:Net"}
data: {dataset: "shapes.py:Shapes", transform: "augment.py:make", image_size: 32, workers: 2}
batch: {size: 4}
optim: {lr: 0.05, groups: {head: 0.1, "*": 0.02}}
train: {epochs: 2, loss: "losses.py:soft", loss_args: {power: 0.5}, checkpoint: {every_steps: 2}}
metrics: ["torchmetrics.classification:MulticlassAUROC"]
tracking: {log_every: 1, wandb: {mode: disabled}}
launch: {max_restarts: 2}
""",
}


class Project:
    """A folder with a recipe and code, and `launch` in it.

    Args:
        folder: where its files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, text in FILES.items():
            self.write(name, text)

    def write(self, name, text):
        (self.folder / name).write_text(text, encoding="utf-8")

    def change(self, name, old, new):
        text = (self.folder / name).read_text(encoding="utf-8")
        assert old in text
        self.write(name, text.replace(old, new))

    def run_dir(self, name):
        return RunDir(self.folder.parent / name)

    def start(self, *arguments, slow_s=0.0):
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, **ENVIRONMENT, "SLOW_S": str(slow_s)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def launch(self, *arguments, code=0, cwd=None):
        """What `launch …` printed; it ended with this exit code."""
        done = warm.launch(arguments, cwd=cwd or self.folder, env=os.environ | ENVIRONMENT, merged=True)
        assert done.returncode == code, done.stdout
        return done.stdout


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "project")
