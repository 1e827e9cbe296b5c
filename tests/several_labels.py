"""A data set whose images have several classes: that of their folder, and whether its name comes early."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


class Photos:
    """Of a folder as ``data.path`` names it; every seventh image has no class at all."""

    def __init__(self, split, path):
        self.folders = sorted(entry.name for entry in (Path(path) / "train").iterdir())
        self.classes = [*self.folders, "early"]
        self.files = sorted((Path(path) / split).glob("*/*.*"))

    def __len__(self):
        return len(self.files)

    def key(self, i):
        return str(self.files[i])

    def label(self, i):
        place = self.folders.index(self.files[i].parent.name)
        if i % 7 == 6:
            return []
        return [place, len(self.folders)] if place < len(self.folders) // 2 else [place]

    def __getitem__(self, i):
        with Image.open(self.files[i]) as image:
            return image.convert("RGB"), self.label(i)
