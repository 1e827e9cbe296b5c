"""Data sets that Hugging Face's library has saved on disk (Arrow), written once as a list beside its images.

The library reads them in a process of its own: it brings pandas and threads, which nobody else here wants.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARY, EXTRA = "datasets", "pip install 'finetune-launcher[huggingface]'"
OF_SPLITS, OF_ONE = "dataset_dict.json", ("state.json", "dataset_info.json")
"""What ``save_to_disk`` leaves in a folder: of several splits, and in that of each."""
LIST = "list.jsonl"
"""The list that is written."""


def is_saved(place: Path) -> bool:
    """Whether a folder is what ``save_to_disk`` has made."""
    return (place / OF_SPLITS).is_file() or all((place / name).is_file() for name in OF_ONE)


def folder_name(place: Path) -> str:
    """What the folder that it is written to is called: another where it was saved anew."""
    stamps = [(file.name, file.stat().st_mtime_ns) for file in sorted(place.glob("**/*.json"))]
    said = f"{place.absolute()} {stamps}".encode(errors="surrogateescape")
    return f"saved-{hashlib.blake2b(said, digest_size=6).hexdigest()}"


def find_problem(place: Path) -> str | None:
    """Why it cannot be read here; None: it can."""
    found = importlib.util.find_spec(LIBRARY)
    if found and found.origin:  # else a folder of that name
        return None
    return f"{place}: was saved by Hugging Face's library {LIBRARY}, which is not installed: {EXTRA}"


def write(target: Path, *, place: Path) -> None:
    """Write the images and a list of them into a folder. What lies in the working directory is not imported (-P).

    Raises:
        UsageError: it cannot be read; says why.
    """
    if problem := find_problem(place):
        raise UsageError(problem)
    print(f"{place}: saved by {LIBRARY}; its images are written once to the launcher's cache", file=sys.stderr)
    command = [sys.executable, "-P", "-m", "launcher.images.saved_sets", str(place), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(f"{place}: cannot be read by {LIBRARY}: {last}")


def _write(place: Path, target: Path) -> None:
    """In a process of its own."""
    import datasets

    found = datasets.load_from_disk(str(place))
    splits: dict[str, Any] = dict(found) if isinstance(found, datasets.DatasetDict) else {"": found}
    with (target / LIST).open("w", encoding="utf-8") as file:
        for split, rows in splits.items():
            for row in _rows(rows, target, split):
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _rows(rows: Any, target: Path, split: str) -> Iterator[dict[str, Any]]:
    """What the list says of each image, whose file is written. Classes have their names."""
    import datasets

    images = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise UsageError(f"no column of images ({', '.join(rows.features)})")
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    named = {name: names for name, kind in rows.features.items() if (names := _class_names(kind)) is not None}
    for number, row in enumerate(rows):
        said = {name: value for name, value in row.items() if name not in images}
        said |= {name: _named(row[name], names) for name, names in named.items()}
        for name in images:
            said[name] = _write_image(row[name], target, Path(split, name, f"{number:07d}"), place=number)
        yield said | {"path": said[images[0]]} | ({"split": split} if split else {})


def _class_names(kind: Any) -> list[str] | None:
    """Of a column of classes, or of lists of them; None: it is another."""
    names = getattr(kind, "names", None) or getattr(getattr(kind, "feature", None), "names", None)
    return list(names) if names else None


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [names[one] for one in value]
    return None if value is None or value < 0 else names[value]  # -1: of a test set that keeps its classes secret


def _write_image(image: dict[str, Any] | None, target: Path, where: Path, *, place: int) -> str:
    """Its bytes as they are, or a link to its file; returns the path from ``target``."""
    if not image or not (image["bytes"] or image["path"]):
        raise UsageError(f"row {place} has no image")
    file = target / where
    file.parent.mkdir(parents=True, exist_ok=True)
    if not image["bytes"]:
        source = Path(image["path"]).absolute()
        file = file.with_suffix(source.suffix)
        file.symlink_to(source)
    else:
        file = file.with_suffix(_ending(image["bytes"]))
        file.write_bytes(image["bytes"])
    return os.path.relpath(file, target)


def _ending(content: bytes) -> str:
    """By what the bytes are; a damaged image is found later, as in any folder."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as found:
            return f".{(found.format or 'png').lower()}"
    except Exception:  # whatever foreign bytes make the decoders raise
        return ".png"


if __name__ == "__main__":
    _write(Path(sys.argv[1]), Path(sys.argv[2]))
