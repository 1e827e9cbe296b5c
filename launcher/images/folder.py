"""Image folders (``PATH/train/CLASS/*.jpg``, ``PATH/val/CLASS/*.jpg``), read without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError
from launcher.images.left_out import describe_endings
from launcher.images.walk import EXTENSIONS, LeftOut, Walk, class_folders, composed, folder_inode, has_image

if TYPE_CHECKING:
    from collections.abc import Iterator

SPLITS = ("train", "val")
CACHE_CURE = "set FINETUNE_LAUNCHER_CACHE to a folder that can be written to"


def cache_dir() -> Path:
    """The launcher's own cache: FINETUNE_LAUNCHER_CACHE, or a folder in XDG_CACHE_HOME."""
    if own := os.environ.get("FINETUNE_LAUNCHER_CACHE"):
        return Path(own)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise UsageError(f"there is no home folder (HOME); {CACHE_CURE}") from None
    return Path(base) / "finetune-launcher"


def find_classes(split: Path) -> list[str]:
    """Names of the classes of one split, sorted; a name in composed and in decomposed Unicode is one class."""
    return sorted(names[0] for names in class_folders(split).values())


def list_images(split: Path, classes: list[str]) -> list[tuple[str, int]]:
    """Paths of all images of one split, each with the index of its class; the order is the same on every machine."""
    return walk(split, classes)[0]


def walk(split: Path, classes: list[str]) -> tuple[list[tuple[str, int]], LeftOut]:
    """The images as :func:`list_images` returns them, and what was left out."""
    folders = class_folders(split)
    wanted = [folders.get(composed(name), []) for name in classes]
    found = Walk(split, [folder for names in wanted for folder in names])
    found.look_beside(split)
    by_class = (sorted(path for folder in names for path in found.images[folder]) for names in wanted)
    return [(path, index) for index, paths in enumerate(by_class) for path in paths], found.left_out


def find_problems(path: Path, *, missing_val_classes: str = "error", splits: tuple[str, str] = SPLITS) -> list[str]:
    """The reasons why ``path`` cannot be trained on, each with what to do.

    Args:
        path: holds train/ and val/.
        missing_val_classes: ``allow``: validation may lack some of the classes.
        splits: what the folders for training and for validation are called.
    """
    if not path.is_dir():
        return [f"{path}: no such folder; it must hold train/CLASS/*.jpg and val/CLASS/*.jpg"]
    missing = [s for s in splits if not (path / s).is_dir()]
    if missing:
        found = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())[:8]) or "no folders"
        return [f"{path}: no {' and no '.join(f'{s}/' for s in missing)} in it (found {found})"]
    folders = {s: class_folders(path / s) for s in splits}
    problems = [
        f"{path / s}: no class folders in it; put each class's images into {s}/CLASS/" for s in splits if not folders[s]
    ]
    if problems:
        return problems
    shared = [text for s in splits for text in _shared_folders(path / s, folders[s])]
    lacking = [*_lacking(path, folders, missing_val_classes), *_alone(path, folders)]
    return [*lacking, *shared, *([] if shared else _empty(path, folders, missing_val_classes))]


def _lacking(path: Path, folders: dict[str, dict[str, list[str]]], missing_val_classes: str) -> Iterator[str]:
    """Classes that only one of the splits has."""
    train, val = folders
    for here, there in ((train, val), (val, train)):
        extra = sorted(names[0] for key, names in folders[here].items() if key not in folders[there])
        if not extra or (here == train and missing_val_classes == "allow"):
            continue
        text = f"{path}: {few(extra)} in {here}/ but not in {there}/; both must have the same class folders"
        yield text + ("; data.missing_val_classes=allow learns them unmeasured" if here == train else "")


def _alone(path: Path, folders: dict[str, dict[str, list[str]]]) -> Iterator[str]:
    """A single class: there is nothing to tell it from."""
    train, val = folders
    if len({*folders[train], *folders[val]}) == 1:
        (names,) = folders[train].values()
        yield (
            f"{path / train}: one class folder, {names[0]!r}; a classifier tells two or more apart: put images of "
            f"something else into a second one ({train}/other/, {val}/other/)"
        )


def _shared_folders(split: Path, folders: dict[str, list[str]]) -> Iterator[str]:
    """Classes that are links to one and the same folder, or to one that holds the class folders."""
    around = {folder_inode(str(folder)) for folder in (split.parent, *split.resolve().parents, split)}
    seen: dict[Any, str] = {}
    for name in (name for names in folders.values() for name in names):
        inode = folder_inode(str(split / name))
        if inode in around:
            yield f"{split / name}: a link to {(split / name).resolve()}, which holds the class folders; remove it"
        elif inode in seen:
            yield (
                f"{split}: {seen[inode]!r} and {name!r} are the same folder, {(split / name).resolve()}; "
                "an image has one class: remove one of them"
            )
        seen.setdefault(inode, name)


def _empty(path: Path, folders: dict[str, dict[str, list[str]]], missing_val_classes: str) -> Iterator[str]:
    """Classes without an image."""
    train = next(iter(folders))
    for split, classes in folders.items():
        suspects = [
            names[0] for names in classes.values() if not any(has_image(str(path / split / name)) for name in names)
        ]
        if not suspects:
            continue
        listed, left_out = walk(path / split, suspects)  # follows links too
        empty = [name for index, name in enumerate(suspects) if index not in {label for _, label in listed}]
        if split != train and missing_val_classes == "allow" and len(empty) < len(classes):
            continue
        if empty:
            looked = f"looked for {', '.join(EXTENSIONS)} and what else Pillow opens"
            others = "; ".join(describe_endings(left_out))
            yield f"{path / split}: no images in {few(empty)} ({looked}){f'; {others}' if others else ''}"


def find_empty(place: Path, classes: list[str]) -> Iterator[str]:
    """Classes without an image in a folder of class folders that is not divided."""
    known = class_folders(place)
    yield from _empty(place.parent, {place.name: {composed(name): known[composed(name)] for name in classes}}, "error")


def read_bad_images(file: Path) -> dict[str, Any] | None:
    """A run's ``bad_images.json``; None if it is missing or damaged."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found


def read_quarantine(bad_images: Path) -> frozenset[str]:
    """The images that a run leaves out, by its ``bad_images.json``: paths relative to the data folder."""
    found = read_bad_images(bad_images)
    return frozenset(image["path"] for image in found["images"]) if found else frozenset()


def relative(path: str, folder: Path) -> str:
    """A listed path, relative to its data folder by its text: the same whether either of them is absolute or not."""
    inside = path.removeprefix(f"{folder}/")
    if inside != path and ".." not in inside:  # of nearly all, and as it would come out below
        return inside
    return os.path.relpath(os.path.abspath(path), os.path.abspath(folder))  # noqa: PTH100


def printable(path: str) -> str:
    """A path for messages: bytes that are not UTF-8 are escaped, so that it can be printed."""
    return path.encode(errors="backslashreplace").decode()


def few(names: list[str], limit: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(n) for n in names[:limit]) + more
