"""scikit-learn's 1,797 images of handwritten digits, written as an image folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.images.folder import SPLITS

if TYPE_CHECKING:
    from pathlib import Path

VAL_FRACTION = 0.2


def write_digits(target: Path) -> None:
    """Write train/ (1,437 images) and val/ (360) into a folder, stratified, 8 x 8 px PNG."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = range(len(digits.target))
    parts = train_test_split(indices, test_size=VAL_FRACTION, random_state=0, stratify=digits.target)
    for split, part in zip(SPLITS, parts, strict=True):
        for index in part:
            folder = target / split / str(digits.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * (255 / 16)).round().astype("uint8")
            Image.fromarray(pixels).save(folder / f"{index:04d}.png")
