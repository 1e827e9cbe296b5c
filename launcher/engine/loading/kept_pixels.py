"""Decoded pixels of a split's images, kept on this node: files of pixels, and an index that says where each image is.

The supervisor prepares them (:mod:`launcher.engine.loading.keep_pixels`); ranks and their loader processes map them
into memory. An index is written when all that it names is, so that half of a build is never taken for whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
import zipfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

from launcher.engine.loading.crops import Box, CentreCrop, Pixels, View
from launcher.engine.loading.decode import open_image, read_image
from launcher.system.files import fsync

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.engine.loading.crops import Picture

VERSION = 1
FOLDER_VARIABLE = "LAUNCH_PIXELS"
"""Environment variable of a worker: the folder of the pixels that were prepared on its node; unset: there are none."""
MISSING = -1
PIECE, OFFSET, ROWS, COLUMNS, HEIGHT, WIDTH, SIZE, CHANGED = range(8)
"""Columns of an index. Which file, and where in it; height and width as kept; of the whole image; the file's stamp."""


class Made(NamedTuple):
    """What is kept of an image."""

    pixels: torch.Tensor
    """uint8, contiguous and flat: a whole picture H x W x 3, a view 3 x S x S."""
    rows: int
    """H or S."""
    columns: int
    """W or S."""
    height: int
    """Of the whole image."""
    width: int
    """Likewise."""


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What is kept of each image of a split."""

    short_side: int | None
    """Whole pictures, of random crops: pixels of the short side, at most; None: what the centre crop shows."""
    image_size: int
    """Of the centre crop."""
    resize_size: int
    """Likewise."""
    interpolation: str
    """Of resizing."""
    background: tuple[int, int, int]
    """Of what transparency shows."""
    grey_range: tuple[float, float] | None
    """As of :class:`launcher.engine.data.Preprocessing`."""
    fast: bool
    """Whether large JPEG files are decoded no larger than ``short_side`` needs."""

    def folder(self, root: Path, data: Path, split: str) -> Path:
        """Where the pixels of a split lie below ``root``: another folder for all that makes them others."""
        code = [VERSION, version("torchvision"), version("pillow"), version("torch")]
        text = json.dumps([code, str(data.absolute()), split, asdict(self)])
        return root / hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]

    def make(self, path: str) -> Made:
        """Decode a file.

        Raises:
            TrainingError: it cannot be decoded.
        """
        options = {"background": self.background, "grey_range": self.grey_range}
        if self.short_side is None:
            crop = CentreCrop(
                resize_size=self.resize_size, image_size=self.image_size, interpolation=self.interpolation
            )
            image = read_image(path, **options)  # type: ignore[arg-type]
            height, width = image.shape[-2:]
            return Made(crop(image).flatten(), self.image_size, self.image_size, height, width)
        picture = open_image(path, **options) if self.fast else Pixels(read_image(path, **options))  # type: ignore[arg-type]
        height, width = picture.height, picture.width
        image = picture.part(Box(0, 0, height, width), self.short_side)
        share = self.short_side / min(height, width)
        if share < 1:
            size = [max(1, round(height * share)), max(1, round(width * share))]
            image = v2.functional.resize(image, size, InterpolationMode(self.interpolation), antialias=True)
        rows, columns = image.shape[-2:]
        return Made(image.permute(1, 2, 0).flatten(), rows, columns, height, width)

    def num_bytes(self, height: int, width: int) -> int:
        """What an image of this size takes."""
        if self.short_side is None:
            return 3 * self.image_size**2
        share = min(1.0, self.short_side / min(height, width))
        return int(3 * height * share * width * share)


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where the pixels of a listing of images are."""

    names: list[str]
    """Of the images, in the order of the listing."""
    pieces: list[str]
    """Files of pixels, in the index's own folder."""
    rows: np.ndarray
    """A row an image, int64; PIECE is MISSING where nothing is kept of it."""

    @classmethod
    def read(cls, file: Path) -> Index | None:
        """None: it is missing, damaged, or names pixels that are not there."""
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
                names, pieces = (json.loads(found[key].tobytes()) for key in ("names", "pieces"))
                index = cls(names=names, pieces=pieces, rows=found["rows"])
            rows = index.rows
            ends = rows[:, OFFSET] + 3 * rows[:, ROWS] * rows[:, COLUMNS]
            for number, piece in enumerate(pieces):
                needed = int(ends[rows[:, PIECE] == number].max(initial=0))
                if needed and (file.parent / piece).stat().st_size < needed:
                    return None
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
            return None
        return index if len(index.names) == len(rows) else None

    def write(self, file: Path) -> None:
        """Write it whole, or not at all."""
        beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        names, pieces = (np.frombuffer(json.dumps(t).encode("ascii"), np.uint8) for t in (self.names, self.pieces))
        try:
            with beside.open("wb") as stream:
                np.savez(stream, rows=self.rows, names=names, pieces=pieces)
            fsync(beside)
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)


def index_file(folder: Path, digest: str) -> Path:
    """The index of a listing of images, by the digest of :class:`~launcher.engine.loading.samples.Samples`."""
    return folder / f"index-{digest[:24]}.npz"


class KeptPixels:
    """The pixels of a split, mapped into memory.

    Args:
        index: where they are.
        folder: that the index is in.
        views: whether they are what the centre crop shows.
    """

    def __init__(self, index: Index, folder: Path, *, views: bool) -> None:
        self._rows = index.rows
        self._views = views
        with warnings.catch_warnings():  # torch minds that the pixels cannot be written to; nobody does
            warnings.simplefilter("ignore")
            self._pieces = [
                torch.from_numpy(np.memmap(folder / piece, dtype=np.uint8, mode="r")) for piece in index.pieces
            ]

    @classmethod
    def find(cls, keeping: Keeping, data: Path, split: str, digest: Callable[[], str]) -> KeptPixels | None:
        """Those that the supervisor has prepared for this process; None: there are none."""
        root = os.environ.get(FOLDER_VARIABLE)
        if not root:
            return None
        folder = keeping.folder(Path(root), data, split)
        index = Index.read(index_file(folder, digest()))
        if index is not None:
            with contextlib.suppress(OSError, ValueError):  # a limit of the address space
                return cls(index, folder, views=keeping.short_side is None)
        return None

    def get(self, number: int) -> Picture | View | None:
        """Image ``number`` of the listing; None: it is not kept."""
        piece, offset, rows, columns, height, width = self._rows[number, : WIDTH + 1].tolist()
        if piece == MISSING:
            return None
        found = self._pieces[piece][offset : offset + 3 * rows * columns]
        if self._views:
            return View(found.view(3, rows, columns))
        return Pixels(found.view(rows, columns, 3).permute(2, 0, 1), size=(height, width))


def known_rows(folder: Path, names: Sequence[str], stamps: np.ndarray) -> tuple[list[str], np.ndarray]:
    """What is kept already of files that have not changed: pieces, and rows for an index of ``names``."""
    rows = np.full((len(names), 8), MISSING, dtype=np.int64)
    rows[:, SIZE:] = stamps
    pieces: list[str] = []
    for file in sorted(folder.glob("*.npz")):
        index = Index.read(file)
        if index is None or not index.names:
            continue
        places = {name: number for number, name in enumerate(index.names)}
        theirs = np.array([places.get(name, MISSING) for name in names], dtype=np.int64)
        usable = (theirs != MISSING) & (rows[:, PIECE] == MISSING)
        usable &= (index.rows[theirs, SIZE:] == stamps).all(axis=1) & (index.rows[theirs, PIECE] != MISSING)
        taken = index.rows[theirs[usable]]
        taken[:, PIECE] += len(pieces)
        rows[usable] = taken
        pieces += index.pieces
    return used_pieces(pieces, rows)


def used_pieces(pieces: Sequence[str], rows: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The same without the pieces that no row is in."""
    used = sorted({int(number) for number in rows[:, PIECE]} - {MISSING})
    places = {number: place for place, number in enumerate(used)} | {MISSING: MISSING}
    rows[:, PIECE] = [places[int(number)] for number in rows[:, PIECE]]
    return [pieces[number] for number in used], rows
