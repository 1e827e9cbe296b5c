"""Keys that might read what a place holds, likeliest first. Whoever asks tries them out before naming one."""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError
from launcher.images import columns, gone, lists
from launcher.images.parts import ListRows
from launcher.images.walk import is_hidden, is_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from launcher.images.source import Source

TRAIN, VAL, TEST = ("train",), ("val", "valid", "validation"), ("test",)
"""What the parts are called, in any case of letters."""
OTHER_NAMES = {
    "train": ("training", "trainset", "train_set", "train_images"),
    "val": ("dev", "eval", "evaluation", "validate", "testing", "testset", "test_set", "holdout", "val_images"),
}
"""What they are called elsewhere: named in messages, never taken without being asked for."""
BESIDE = {"data", "dataset", "set", "split", "images", "image", "imgs", "img", "photos", "pictures", "jpg", "png"}
"""Words, and numbers, that stand beside these names, as in train_images and val2017."""
VAL_FRACTION = 0.2
"""What is suggested where nothing says which images are for validation."""
MOST_LEVELS, NUM_SEARCHED = 4, 32
"""How deep, and in how many folders of a level, images are looked for."""
NUM_LOOKED_INTO, NUM_ENTRIES = 8, 500
"""Of folders that may be classes, how many are looked into, and how much of each."""
MOST_S, MOMENT_S = 10.0, 1.0
"""After so many seconds no more is tried out; after a moment somebody who waits is told what for."""


def in_time(try_out: Callable[[Source], str | None]) -> Callable[[Source], str | None]:
    """The same while there is time, from the first; later None without a look, as of what no way is known to read."""
    begin, told = 0.0, False

    def try_in_time(source: Source) -> str | None:
        nonlocal begin, told
        begin = begin or time.monotonic()
        passed = time.monotonic() - begin
        if passed >= MOST_S:
            return None
        waiting = threading.Timer(MOMENT_S - passed, print, ["looking for what would work …"], {"file": sys.stderr})
        if not told:
            waiting.start()
        try:
            return try_out(source)
        finally:
            told = told or not waiting.is_alive()
            waiting.cancel()

    return try_in_time


def part_of(name: str) -> str | None:
    """Which part the name of a folder, or of a split in a list, says: train, val or test; None: none of them."""
    words = re.findall(r"[a-z]+", name.lower())
    said = [word for word in words if word not in BESIDE] if len(words) > 1 else words
    if len(said) != 1:
        return None
    if said[0] in (*TRAIN, *OTHER_NAMES["train"]):
        return "train"
    if said[0] in (*TEST, "testing", "testset", "holdout"):
        return "test"
    return "val" if said[0] in (*VAL, *OTHER_NAMES["val"]) else None


def are_parts(names: Iterable[str]) -> bool:
    """Whether all names are those of parts."""
    found = [part_of(name) for name in names]
    return bool(found) and None not in found


def find(source: Source) -> Iterator[Source]:
    """The same source with the keys that might read it, or another place near it."""
    plain = replace(source, named=None, train=None, val=None, val_fraction=None)
    place = source.place
    if lists.is_list(place):
        yield from _of_list(replace(plain, named=source.named))
    elif place.is_dir():
        yield from itertools.chain(_above(plain, place), _in_folder(plain, place))
        level = [place]
        for _ in range(MOST_LEVELS):
            level = [inner for folder in level[:NUM_SEARCHED] for inner in folders(folder).values()]
            for folder in level[:NUM_SEARCHED]:
                yield from _in_folder(plain, folder, most_lists=1)
    elif not place.exists():
        yield from (candidate for near in near_names(place) for candidate in _as_it_is(plain, near))


def folders(place: Path) -> dict[str, Path]:
    """Those right below that can be looked into."""
    try:
        with os.scandir(place) as entries:  # which knows folders without asking for each file
            names = sorted(one.name for one in entries if not is_hidden(one.name) and one.is_dir())
    except OSError:
        return {}
    return {name: place / name for name in names if os.access(place / name, os.R_OK | os.X_OK)}


def near_names(place: Path) -> list[Path]:
    """What is called nearly as a place that is not there, beside the last of its folders that is."""
    import difflib

    there = next((folder for folder in place.absolute().parents if folder.is_dir()), Path("/"))
    name, *below = place.absolute().relative_to(there).parts
    try:
        names = {entry.name.lower(): entry.name for entry in there.iterdir() if not is_hidden(entry.name)}
    except OSError:
        return []
    base = Path(*place.parts[: len(place.parts) - 1 - len(below)])
    near = difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.7)
    return [path for one in near if (path := base.joinpath(names[one], *below)).exists()]


def _as_it_is(plain: Source, place: Path) -> Iterator[Source]:
    at = replace(plain, path=str(place))
    yield at
    yield replace(at, val_fraction=VAL_FRACTION)


def _above(plain: Source, place: Path) -> Iterator[Source]:
    """Where somebody has named one of the parts, or one class: the folder that holds all."""
    around = place.absolute().parent
    if part_of(place.name):
        yield replace(plain, path=str(around))
    elif has_loose_images(place):
        yield replace(plain, path=str(around.parent if part_of(around.name) else around))
        yield replace(plain, path=str(around), val_fraction=VAL_FRACTION)


def _in_folder(plain: Source, place: Path, *, most_lists: int = 2) -> Iterator[Source]:
    inner, at = folders(place), replace(plain, path=str(place))
    train, val = _train_and_val(inner)
    if train and val:
        usual = train.lower() in TRAIN and val.lower() in (*VAL, *TEST)
        yield at if usual else replace(at, train=train, val=val)
    if train and not val:
        yield replace(at, train=None if train.lower() in TRAIN else train, val_fraction=VAL_FRACTION)
    elif train:
        yield replace(at, path=str(place / train), val_fraction=VAL_FRACTION)
    elif _are_classes([*inner.values()][:NUM_LOOKED_INTO]):
        yield replace(at, val_fraction=VAL_FRACTION)
    for table in sorted(_lists_in(place))[:most_lists]:
        yield from _of_list(replace(at, path=str(table)))


def _lists_in(place: Path) -> list[Path]:
    """Those right in a folder; none where nobody may look into it."""
    try:
        names = os.listdir(place)  # noqa: PTH208
    except OSError:
        return []
    return [place / name for name in names if name.lower().endswith(lists.ENDINGS) and lists.is_list(place / name)]


def _are_classes(some: list[Path]) -> bool:
    """Whether several folders hold images, by a few of them, and none the parts of a data set."""
    return sum(map(shows_images, some)) > 1 and not any(part_of(name) for one in some for name in folders(one))


def shows_images(folder: Path, *, levels: int = 2) -> bool:
    """Whether images are among the first entries of a folder, or of some right below: / may be meant, too."""
    try:
        with os.scandir(folder) as entries:
            if any(is_image(one.name) for one in itertools.islice(entries, NUM_ENTRIES)):
                return True
    except OSError:
        return False
    inner = [*folders(folder).values()][:NUM_LOOKED_INTO] if levels > 1 else []
    return any(shows_images(one, levels=levels - 1) for one in inner)


def _train_and_val(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The names of these parts; where none is for validation, of the test set."""
    parts = {part_of(name): name for name in reversed([*names])}
    return parts.get("train"), parts.get("val") or parts.get("test")


def _of_list(at: Source) -> Iterator[Source]:
    """A list with the names that its columns and splits probably have."""
    named = _with_columns(at)
    try:
        rows = lists.read(at.place, named.form)
    except UsageError:
        rows = ()
    if rows and not any(os.path.isfile(row.path) for row in rows[: columns.NUM_ROWS]):  # noqa: PTH113
        path = gone.find_path(ListRows(at.place, named.form), rows)
        named = replace(named, columns={**named.columns, "path": path}) if path else named
    splits = Counter(row.split for row in rows if row.split)
    if not splits:
        yield from (replace(named, val_fraction=VAL_FRACTION), named)
        return
    train, val = _train_and_val(splits)
    if not (train or val) and len(splits) == 2:  # noqa: PLR2004
        train, val = (name for name, _ in splits.most_common())
    yield named
    if train and val:
        yield replace(named, train=train, val=val)
    elif train:
        yield replace(named, train=train if train.lower() not in TRAIN else None, val_fraction=VAL_FRACTION)


def _with_columns(at: Source) -> Source:
    """The same, with the columns that are not called path and label."""
    try:
        lists.read(at.place, at.form)
    except lists.ColumnsError as error:
        return replace(at, columns={**at.columns, **error.guesses})
    except UsageError:
        pass
    return at


def has_loose_images(place: Path) -> bool:
    """Whether images lie in a folder that has no folders."""
    return not folders(place) and shows_images(place, levels=1)
