"""Classifies files: finds them, and writes what the model says of each as text, JSON, CSV or Parquet."""

from __future__ import annotations

import csv
import glob
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from launcher.errors import UsageError
from launcher.images import walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from launcher.tools.trained_model import Prediction

FROM_STDIN = "-"


def find_images(named: Sequence[str], stdin: TextIO) -> Iterator[str]:
    """Paths of the images that are named, in that order; those of a folder, and of all below it, by name.

    Args:
        named: files, folders, patterns (``photos/*.jpg``; ``**`` for all folders below) or ``-``.
        stdin: has a path in each line, for ``-``.

    Raises:
        UsageError: nothing is there under a name.
    """
    for name in named:
        if name == FROM_STDIN:
            yield from filter(None, (line.rstrip("\r\n") for line in stdin))
        elif Path(name).is_dir():
            found = list(_below(name))
            if not found:
                raise UsageError(f"{name}: no images in it (looked for {', '.join(walk.EXTENSIONS)} and more)")
            yield from found
        elif Path(name).exists():
            yield name
        elif found := sorted(glob.glob(name, recursive=True)):  # noqa: PTH207  patterns may be absolute
            yield from (path for path in found if Path(path).is_file())
        else:
            raise UsageError(f"{name}: no such file, folder or pattern")


def _below(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not walk.is_hidden(name))
        yield from (
            str(Path(parent, name)) for name in sorted(files) if walk.is_image(name) and not walk.is_hidden(name)
        )


def write_text(predictions: Iterable[Prediction], file: TextIO) -> None:
    """A line for each image: its path and its classes, for people."""
    for found in predictions:
        classes = "  ".join(f"{name} {probability:.3f}" for name, probability in found.top)
        none = f"cannot be read: {found.problem}" if found.problem else "none of the classes"
        print(f"{found.name}  {classes or none}", file=file)


def write_json(predictions: Iterable[Prediction], file: TextIO) -> None:
    """A JSON object in each line."""
    for found in predictions:
        print(json.dumps(as_json(found), ensure_ascii=False), file=file)


def as_json(found: Prediction) -> dict[str, Any]:
    """``{"image", "top": [{"class", "probability"}, …], "problem"}``: how programs are told of an image."""
    top = [{"class": name, "probability": probability} for name, probability in found.top]
    return {"image": found.name, "top": top, "problem": found.problem}


def write_csv(predictions: Iterable[Prediction], file: TextIO, *, top: int) -> None:
    """A row for each image: image, class_1, probability_1, …, problem."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns(top))
    writer.writerows(row(found, top) for found in predictions)


def write_parquet(predictions: Iterable[Prediction], path: Path, *, top: int) -> None:
    """The same columns as Parquet, by pyarrow.

    Raises:
        UsageError: pyarrow is not installed, or the file cannot be written.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UsageError("--parquet needs pyarrow: pip install pyarrow; --csv and --json need nothing") from None
    rows = [row(found, top) for found in predictions]
    types = {name: pa.float32() if name.startswith("probability") else pa.string() for name in columns(top)}
    table = {name: pa.array([line[i] for line in rows], kind) for i, (name, kind) in enumerate(types.items())}
    try:
        parquet.write_table(pa.table(table), path)
    except OSError as error:
        raise UsageError(f"--parquet {path}: cannot be written: {error.strerror or error}") from None


def columns(top: int) -> list[str]:
    """Names of a table's columns."""
    ranked = [f"{name}_{place}" for place in range(1, top + 1) for name in ("class", "probability")]
    return ["image", *ranked, "problem"]


def row(found: Prediction, top: int) -> list[Any]:
    """A row of a table; what there is none of is None."""
    ranked = [value for pair in found.top for value in pair]
    return [found.name, *ranked, *[None] * (2 * top - len(ranked)), found.problem]


def counted(predictions: Iterable[Prediction], counts: dict[str, int]) -> Iterator[Prediction]:
    """Pass predictions on, and count those that could be ``read`` and those that were ``unread``."""
    for found in predictions:
        counts["unread" if found.problem else "read"] += 1
        yield found
