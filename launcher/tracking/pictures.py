"""The pictures that trackers send: the same validation images through the epochs, a training batch, the mistakes."""

from __future__ import annotations

import base64
import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.images.folder import printable
from launcher.runs import thumbnails

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir
    from launcher.tracking.records import Record

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A small picture with what is said beneath it."""

    jpeg: bytes
    """Its file."""
    caption: str
    """Its class."""
    answer: str = ""
    """Of the model, with its confidence; empty: it has given none."""
    is_right: bool | None = None
    """Whether the model's answer is; None: it has given none."""


class Pictures:
    """Makes them, each once; none with ``tracking.pictures: false``.

    Args:
        run: the run directory.
        recipe: the run's, whose images are where it says.
    """

    def __init__(self, run: RunDir, recipe: Recipe) -> None:
        self._run = run
        self._recipe = recipe
        self._of_examples: dict[str, bytes | None] = {}

    def thumbnails(self, rows: Sequence[Json]) -> list[bytes | None]:
        """A small JPEG of each row's ``image``; None where it cannot be read, or may not be sent."""
        return thumbnails.jpegs(rows, self._recipe.data) if self._recipe.tracking.pictures else [None] * len(rows)

    def examples(self, record: Record) -> list[Picture]:
        """The validation images that a line shows, each with the answer."""
        rows = record.line.get("examples")
        rows = rows if isinstance(rows, list) else []
        lacking = [row for row in rows if row["image"] not in self._of_examples]
        made = zip(lacking, self.thumbnails(lacking), strict=True)
        self._of_examples.update((row["image"], small) for row, small in made)
        return [
            Picture(
                jpeg=small,
                caption=in_words(row["true"]),
                answer=_with_confidence(row),
                is_right=row["true"] == row["predicted"],
            )
            for row in rows
            if (small := self._of_examples[row["image"]])
        ]

    def batch(self, record: Record) -> list[Picture]:
        """The first training images as the model saw them, with the first line of training."""
        if not record.is_first or record.split != "train" or not self._recipe.tracking.pictures:
            return []
        with contextlib.suppress(OSError, ValueError):  # there is none
            found = json.loads(self._run.sample_batch.read_text(encoding="utf-8"))
            mixed = f", {found['mixed']}" if found["mixed"] else ""
            return [
                Picture(jpeg=base64.b64decode(row["picture"].partition(",")[2]), caption=in_words(row["class"]) + mixed)
                for row in found["images"]
                if row["picture"]
            ]
        return []


def _with_confidence(row: Json) -> str:
    sure = row["confidence"]
    return f"{in_words(row['predicted'])} {'no number' if sure is None else f'{sure:.0%}'}"


def in_words(classes: str | list[str]) -> str:
    """A class, or the several classes of an image, for people to read."""
    return printable(classes if isinstance(classes, str) else ", ".join(classes) or "none")
