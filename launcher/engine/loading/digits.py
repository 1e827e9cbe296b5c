"""scikit-learn's 1,797 images of handwritten digits, written once as an image folder under the cache directory."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from launcher.errors import UsageError
from launcher.images import folder as image_folder

VAL_FRACTION = 0.2


def write_digits() -> Path:
    """Write train/ (1,437 images) and val/ (360), stratified, 8 x 8 px PNG; return the folder. Again: nothing to do."""
    target = image_folder.data_path(image_folder.DIGITS, None)
    if target.is_dir():
        return target
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = range(len(digits.target))
    parts = train_test_split(indices, test_size=VAL_FRACTION, random_state=0, stratify=digits.target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside it and renamed: another run that starts at this moment sees the whole folder or none.
        beside = Path(tempfile.mkdtemp(prefix=".digits-", dir=target.parent))
    except OSError as error:
        raise UsageError(
            f"the digits cannot be written to {target.parent}: {error.strerror}; {image_folder.CACHE_CURE}"
        ) from None
    for split, part in zip(image_folder.SPLITS, parts, strict=True):
        for index in part:
            folder = beside / split / str(digits.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * (255 / 16)).round().astype("uint8")
            Image.fromarray(pixels).save(folder / f"{index:04d}.png")
    beside.chmod(0o755)
    try:
        os.rename(beside, target)  # noqa: PTH104  Path.rename would do the same; the error below is os's
    except OSError:  # another run was quicker
        shutil.rmtree(beside)
    return target
