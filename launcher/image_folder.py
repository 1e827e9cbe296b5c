"""Image folders (``PATH/train/CLASS/*.jpg``, ``PATH/val/CLASS/*.jpg``), read without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
SPLITS = ("train", "val")
DIGITS = "digits"
CACHE_CURE = "set FINETUNE_LAUNCHER_CACHE to a folder that can be written to"


def cache_dir() -> Path:
    """Where data that the launcher makes itself is kept: FINETUNE_LAUNCHER_CACHE, or under XDG_CACHE_HOME."""
    if own := os.environ.get("FINETUNE_LAUNCHER_CACHE"):
        return Path(own)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise UsageError(f"there is no home folder (HOME); {CACHE_CURE}") from None
    return Path(base) / "finetune-launcher"


def data_path(name: str, path: str | None) -> Path:
    """The folder with train/ and val/ of a recipe's data set."""
    return cache_dir() / DIGITS if name == DIGITS else Path(str(path)).expanduser()


def find_classes(split: Path) -> list[str]:
    """Names of the class folders of one split, sorted."""
    with os.scandir(split) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def list_images(split: Path, classes: list[str]) -> list[tuple[str, int]]:
    """Paths of all images of one split, each with the index of its class; the order is the same on every machine."""
    return [(path, index) for index, name in enumerate(classes) for path in sorted(_walk(split / name))]


def find_problems(path: Path) -> list[str]:
    """What would keep ``path`` from being trained on, each with what to do."""
    if not path.is_dir():
        return [f"{path}: no such folder; it must hold train/CLASS/*.jpg and val/CLASS/*.jpg"]
    missing = [s for s in SPLITS if not (path / s).is_dir()]
    if missing:
        found = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())[:8]) or "no folders"
        return [f"{path}: no {' and no '.join(f'{s}/' for s in missing)} in it (found {found})"]
    classes = {s: find_classes(path / s) for s in SPLITS}
    problems = [
        f"{path / s}: no class folders in it; put each class's images into train/CLASS/"
        for s in SPLITS
        if not classes[s]
    ]
    if problems:
        return problems
    for here, there in (SPLITS, SPLITS[::-1]):
        extra = sorted(set(classes[here]) - set(classes[there]))
        if extra:
            problems.append(
                f"{path}: {_few(extra)} in {here}/ but not in {there}/; both must have the same class folders"
            )
    for split in SPLITS:
        empty = [name for name in classes[split] if next(_walk(path / split / name), None) is None]
        if empty:
            problems.append(f"{path / split}: no images in {_few(empty)} (looked for {', '.join(EXTENSIONS)})")
    return problems


def read_bad_images(file: Path) -> dict[str, Any] | None:
    """A run's ``bad_images.json``; None where it is not there, or is damaged."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found


def read_quarantine(bad_images: Path) -> frozenset[str]:
    """What a run leaves out, of its ``bad_images.json``: paths relative to the data folder; none without the file."""
    found = read_bad_images(bad_images)
    return frozenset(image["path"] for image in found["images"]) if found else frozenset()


def relative(path: str, folder: Path) -> str:
    """A listed path as seen from the data folder it was listed in."""
    return path.removeprefix(f"{folder}/")


def printable(path: str) -> str:
    """A path for messages: bytes in it that are no UTF-8 could not be printed."""
    return path.encode(errors="backslashreplace").decode()


def _walk(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        yield from (os.path.join(parent, f) for f in files if f.lower().endswith(EXTENSIONS))  # noqa: PTH118 a million times


def _few(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(n) for n in names[:limit]) + more
