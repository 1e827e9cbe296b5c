"""The layouts of images that are known, in words: what is there instead, and the keys that would read it."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.images import lists
from launcher.images.walk import ending_of, has_image, is_hidden, is_image

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from launcher.images.parts import Part
    from launcher.images.source import Source

TRAIN, VAL, TEST = ("train",), ("val", "valid", "validation"), ("test",)
"""What the parts are called, in any case of letters."""
OTHER_NAMES = {
    "train": ("training", "trainset", "train_set", "train_images"),
    "val": ("dev", "eval", "evaluation", "validate", "testing", "testset", "test_set", "holdout", "val_images"),
}
"""What they are called elsewhere: named in messages, never taken without being asked for."""
KNOWN = (
    "PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg (or valid/, validation/, test/; or data.train=X data.val=Y)",
    "PATH/CLASS/*.jpg with data.val_fraction=0.2, which divides it",
    "a list, data.path=FILE.csv (.tsv, .jsonl, .parquet): columns path and label, and split or data.val_fraction=0.2",
    "WebDataset shards, data.path=FOLDER of train-*.tar and val-*.tar (or train/*.tar), or 'DIR/all-{000..009}.tar'",
    (
        "Hugging Face's, saved on disk (save_to_disk) or with metadata.csv or .jsonl; torchvision's, data.name=CIFAR10 "
        "(`launch schema` has them all); your own, data.dataset=file.py:name"
    ),
)
"""The layouts, a line each."""
CURE = re.compile(r"launch RECIPE data\.path=(\S+)(.*)")
"""A line of what would work, with its path and its other keys; commands other than a start say it in their words."""
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".xz")
NUM_NAMED = 8
MOST_LEVELS, NUM_SEARCHED = 4, 32
"""How deep, and in how many folders of a level, images are looked for, to say where they are."""


def shown(source: Source, named: Mapping[str, Part]) -> str:
    """What there is, in short."""
    if lists.is_list(source.place):
        return ", ".join(named) or ("no column split" if source.label == source.path else "no split")
    folders = sorted(entry.name for entry in source.place.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    tables = sorted(entry.name for entry in source.place.iterdir() if lists.is_list(entry))
    more = ", …" if len(folders) > NUM_NAMED else ""
    return ", ".join([*folders[:NUM_NAMED], *tables[:NUM_NAMED]]) + more if folders or tables else "no folders"


def explain(source: Source) -> str:
    """The known layouts, what is in a place that has none of them, and what would work there; lines for people."""
    lines = ["known layouts:", *(f"  {line}" for line in KNOWN)]
    if found := list(_found(source.place)):
        lines += [f"found: {'; '.join(found)}"]
    if works := _works(source):
        lines += ["what would work here:", *(f"  {line}" for line in works)]
    return "".join(f"\n    {line}" for line in lines)


def _found(place: Path) -> Iterator[str]:
    if not place.is_dir():
        if place.is_file():
            yield f"a file {place.suffix or 'without an ending'}"
        return
    entries = [entry for entry in sorted(place.iterdir()) if not is_hidden(entry.name)]
    folders = [entry.name for entry in entries if entry.is_dir()]
    if folders:
        more = f" and {len(folders) - NUM_NAMED} more" if len(folders) > NUM_NAMED else ""
        yield f"{len(folders)} folder{'' if len(folders) == 1 else 's'} ({', '.join(folders[:NUM_NAMED])}{more})"
    endings = Counter(ending_of(entry.name) or "without an ending" for entry in entries if entry.is_file())
    yield from (f"{num} file{'' if num == 1 else 's'} {ending}" for ending, num in endings.most_common(4))
    if not entries:
        yield "nothing"


def _works(source: Source) -> list[str]:
    """Keys for the command line that would read what is there, or what lies deeper; or what it lacks."""
    found = list(_works_here(source))
    if found or not source.place.is_dir():
        return found
    folders = _folders(source.place)
    level = list(folders.values())
    for _ in range(MOST_LEVELS):
        works = [line for folder in level[:NUM_SEARCHED] for line in _works_here(replace(source, path=str(folder)))]
        if keys := [line for line in works if line.startswith("launch ")]:
            return keys[:2]
        level = [inner for folder in level[:NUM_SEARCHED] for inner in _folders(folder).values()]
    holding = [name for name, folder in folders.items() if any(is_image(entry.name) for entry in folder.iterdir())]
    if len(holding) != 1:
        return []
    return [f"a second folder beside {holding[0]}: each is a class, and a model tells two or more apart"]


def _folders(place: Path) -> dict[str, Path]:
    """Those right below that can be looked into."""
    entries = sorted(entry for entry in place.iterdir() if not is_hidden(entry.name))
    return {entry.name: entry for entry in entries if entry.is_dir() and os.access(entry, os.R_OK | os.X_OK)}


def _works_here(source: Source) -> Iterator[str]:
    place = source.place
    if not place.is_dir():
        if place.is_file() and place.suffix.lower() in ARCHIVES:
            yield f"unpack {place}, and name the folder that comes of it"
        elif lists.is_list(place):
            yield from _works_of_list(source)
        return
    entries = {entry.name: entry for entry in sorted(place.iterdir()) if not is_hidden(entry.name)}
    folders = {name: entry for name, entry in entries.items() if entry.is_dir()}
    train = _called(folders, "train", TRAIN)
    val = _called(folders, "val", (*VAL, *TEST))
    if train and val:
        yield f"launch RECIPE data.path={place} data.train={train} data.val={val}"
    elif train:
        path = f"data.path={place}" if train.lower() in TRAIN else f"data.path={place} data.train={train}"
        yield f"launch RECIPE {path} data.val_fraction=0.2"
    elif sum(has_image(str(folder)) for folder in list(folders.values())[:NUM_NAMED]) > 1 and not _inner(folders):
        yield f"launch RECIPE data.path={place} data.val_fraction=0.2"
    yield from (f"launch RECIPE data.path={inner}" for inner in _inner(folders))
    for table in [entry for entry in entries.values() if lists.is_list(entry)][:2]:
        yield f"launch RECIPE data.path={table} data.val_fraction=0.2"
    yield from (f"unpack {name}" for name in [n for n in entries if ending_of(n) in ARCHIVES][:2])
    if not folders and any(is_image(name) for name in entries):
        yield "these images are in no folder that says their class: write a list of them, path,label in each line"


def _works_of_list(source: Source) -> Iterator[str]:
    """The same, of a list that has no training or no validation."""
    splits = {row.split: source.place for row in lists.read(source.place, source.form) if row.split}
    train, val = _called(splits, "train", TRAIN), _called(splits, "val", (*VAL, *TEST))
    if train and val:
        yield f"launch RECIPE data.path={source.label} data.train={train} data.val={val}"
    elif train or not splits:
        yield f"launch RECIPE data.path={source.label} data.val_fraction=0.2"


def _called(folders: Mapping[str, Path], part: str, usual: Iterable[str]) -> str | None:
    names = {*usual, *OTHER_NAMES[part]}
    return next((name for name in folders if name.lower() in names), None)


def _inner(folders: Mapping[str, Path]) -> list[Path]:
    """Folders one level below that hold what was looked for here."""
    return [entry for entry in folders.values() if any((entry / name).is_dir() for name in TRAIN)][:2]
