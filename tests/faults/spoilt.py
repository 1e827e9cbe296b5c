"""`launch` as `python -m tests.faults.spoilt …`: its models give NaN for batches with an all-white image."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torchvision.models import ShuffleNetV2

from launcher.cli import main
from launcher.errors import exit_code_of
from tests.faults.bench import SIZE

if TYPE_CHECKING:
    from pathlib import Path

_forward = ShuffleNetV2.forward


def whiten(file: Path) -> None:
    """Make an image such a one."""
    Image.new("RGB", (SIZE, SIZE), "white").save(file)


def _spoilt(self, images):
    white = (images.amin(dim=(1, 2, 3)) > 2).any()  # the darkest value of white, normalised, is 2.2
    return _forward(self, images) * torch.where(white, torch.nan, 1.0)


if __name__ == "__main__":
    ShuffleNetV2.forward = _spoilt
    sys.exit(exit_code_of(main))
