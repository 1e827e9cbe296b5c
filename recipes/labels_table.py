"""The data set of multi_label.yaml: tables of images with all of their classes. Copy it, and write your own."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image


class LabelsTable:
    """PATH/train.csv and PATH/val.csv with the columns file and labels, as in ``a.jpg,cat;sofa``.

    Args:
        split: train or val.
        path: the folder of the tables, from which files are named too.
    """

    def __init__(self, split: str, path: str) -> None:
        self.folder = Path(path)
        self.rows = self._read(split)
        self.classes = sorted({name for row in self._read("train") for name in self._names(row)})

    def _read(self, split: str) -> list[dict[str, str]]:
        with (self.folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    @staticmethod
    def _names(row: dict[str, str]) -> list[str]:
        return list(dict.fromkeys(name.strip() for name in row["labels"].split(";") if name.strip()))  # each once

    def __len__(self) -> int:
        """How many images."""
        return len(self.rows)

    def key(self, index: int) -> str:
        """The name of an image."""
        return self.rows[index]["file"]

    def label(self, index: int) -> list[int]:
        """Its classes."""
        return [self.classes.index(name) for name in self._names(self.rows[index])]

    def __getitem__(self, index: int) -> tuple[Image.Image, list[int]]:
        """The image and its classes."""
        return Image.open(self.folder / self.key(index)), self.label(index)
