"""The layouts of images that are known, in words: what is there instead, and the keys that would read it."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.images import candidates, columns, lists
from launcher.images.candidates import TRAIN, folders
from launcher.images.walk import ending_of, is_hidden, is_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from launcher.images.parts import Part
    from launcher.images.source import Source

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
_WORD = r"""(?:'[^']*'|"[^"]*"|[^\s;,'"]|,(?=\S))+"""
CURE = re.compile(rf"launch RECIPE data\.path=({_WORD})((?: (?='?data\.\w+=){_WORD})*)")
"""A line of what would work, with its path and its other keys; commands other than a start say it in their words."""
NUM_NAMED, NUM_TRIED, NUM_CURES = 8, 12, 2
"""So many folders are named; so many ways to read what is there are tried, and so many of those that work named."""
ANNOTATIONS = {"annotations", "annotation", "labels", "masks", "imagesets", "segmentationclass", "segmentationobject"}
"""Folders of data sets for detection and segmentation, in lower case."""
NO_CLASSES = ANNOTATIONS | {"images", "image", "imgs", "img", "jpegimages", "pictures", "photos"}
"""Names of folders that say nothing of what is in the images."""
LIST_CURE = "launch RECIPE data.path=FILE.csv data.val_fraction=0.2"
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".xz")
_CURES = {
    " ".join(ARCHIVES): "unpack {}, and name the folder that comes of it",
    ".xlsx .xls .ods .numbers": f"save {{}} as CSV, with the columns path and label: {LIST_CURE}",
    ".txt .dat .lst": f"write {{}} as CSV, a first line path,label and then a row an image: {LIST_CURE}",
    ".json": (
        'write {} as JSON Lines, a line an image, {{"path": …, "label": …}} (`jq -c \'.[]\'` makes lines of a list; '
        "of COCO's boxes take each image's classes): launch RECIPE data.path=FILE.jsonl data.val_fraction=0.2"
    ),
    ".npy .npz .h5 .hdf5 .mat .pkl .pickle .pt .lmdb .mdb .tfrecord .rec": (
        "write the images of {} as files into FOLDER/CLASS/: launch RECIPE data.path=FOLDER data.val_fraction=0.2; or "
        "read them by code of your own: launch RECIPE data.dataset=file.py:name (docs/extending.md)"
    ),
    ".yaml .yml": "name the folder of the images, and not {}, which describes them",
}
FILES = {ending: text for endings, text in _CURES.items() for ending in endings.split()}
"""What to do about files that are no list and no image, by ending."""


def shown(source: Source, named: Mapping[str, Part]) -> str:
    """What there is, in short."""
    if lists.is_list(source.place):
        return ", ".join(named) or ("no column split" if source.label == source.path else "no split")
    folders = sorted(entry.name for entry in source.place.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    tables = sorted(entry.name for entry in source.place.iterdir() if lists.is_list(entry))
    more = ", …" if len(folders) > NUM_NAMED else ""
    return ", ".join([*folders[:NUM_NAMED], *tables[:NUM_NAMED]]) + more if folders or tables else "no folders"


def explain(source: Source, try_out: Callable[[Source], str | None], *, name_known: bool = True) -> str:
    """The known layouts, what is in a place that has none of them, and what would work there; lines for people.

    Args:
        source: where somebody has looked for images.
        try_out: what a start would say of a source: nothing, or the first problem; None: no layout is known there.
        name_known: whether to name the layouts and what is there, too.
    """
    lines = ["known layouts:", *(f"  {line}" for line in KNOWN)] if name_known else []
    if name_known and (found := list(_found(source.place))):
        lines += [f"found: {'; '.join(found)}"]
    if works := [*_cures(source, try_out)] or [*_in_words(source)]:
        lines += ["what would work here:", *(f"  {line}" for line in works)]
    return "".join(f"\n    {line}" for line in lines)


def around(place: Path) -> str:
    """What the last of the folders of a place holds that is there."""
    there = next((folder for folder in place.absolute().parents if folder.is_dir()), None)
    return f"{there} holds {'; '.join(_found(there))}" if there and os.access(there, os.R_OK) else "nothing"


def _found(place: Path) -> Iterator[str]:
    if not place.is_dir():
        if place.is_file():
            yield f"a file {place.suffix or 'without an ending'}"
        return
    entries = _entries(place)
    names = [entry.name for entry in entries if entry.is_dir()]
    if names:
        more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
        yield f"{len(names)} folder{'' if len(names) == 1 else 's'} ({', '.join(names[:NUM_NAMED])}{more})"
    endings = Counter(ending_of(entry.name) or "without an ending" for entry in entries if entry.is_file())
    yield from (f"{num} file{'' if num == 1 else 's'} {ending}" for ending, num in endings.most_common(4))
    if not entries:
        yield "nothing"


def _entries(place: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name; of each it is known whether it is a folder, without asking for it."""
    with os.scandir(place) as entries:
        return sorted((one for one in entries if not is_hidden(one.name)), key=lambda one: one.name)


def command(source: Source, asked: Source) -> str:
    """What would start with a source, as one types it, where the recipe has the keys that were ``asked`` for."""
    keys = {key: (getattr(source, key), getattr(asked, key)) for key in ("train", "val", "val_fraction")}
    keys["group"] = (None, asked.group if source.val_fraction is None else None)  # it goes with val_fraction
    words = [
        f"data.{key}={'null' if value is None else shlex.quote(str(value))}"
        for key, (value, before) in keys.items()
        if (value, before) != (None, None)
    ]
    words += [shlex.quote(columns.as_keys(source.columns))] if source.columns else []
    return " ".join([f"launch RECIPE data.path={shlex.quote(source.named or source.path)}", *words])


def _cures(source: Source, try_out: Callable[[Source], str | None]) -> list[str]:
    """Commands that would read what is there, or near it; where none just works, one of them and what to mend."""
    flawed: list[str] = []
    works: list[str] = []
    for candidate in itertools.islice(candidates.find(source), NUM_TRIED):
        is_inner = works and candidates.part_of(candidate.place.name)  # of what works as a whole
        if candidate == source or is_inner:
            continue
        problem = try_out(candidate)
        if problem == "":
            works.append(f"{command(candidate, source)}{_remark(candidate)}")
            if len(works) == NUM_CURES:
                break
        elif problem and source.place in (candidate.place, *candidate.place.parents):
            flawed.append(f"{command(candidate, source)}, once this is mended: {problem.splitlines()[0]}")
    return list(dict.fromkeys(works)) or flawed[:1]


def _remark(source: Source) -> str:
    """What are the classes, where a folder of them holds folders."""
    if source.val_fraction is None or not source.place.is_dir() or source.train:
        return ""
    names = folders(source.place)
    deep = [name for name in [*names][:NUM_NAMED] if folders(names[name])]
    if not deep or set(map(str.lower, names)) & {*TRAIN}:
        return ""
    return f"   # classes: {', '.join([*names][:NUM_NAMED])}; what lies deeper, as in {deep[0]}, counts as theirs"


def _in_words(source: Source) -> Iterator[str]:
    """What to do first, where nothing can be read as it is."""
    place = source.place
    if not place.is_dir():
        if is_image(place.name) and place.is_file():
            yield f"name a folder of images, or a list of them, and not one image: {LIST_CURE}"
        elif place.is_file() and (text := FILES.get(ending_of(place.name))):
            yield text.format(place)
        return
    names = folders(place)
    some = [*names.values()][:NUM_NAMED]
    if any(name.lower() in ANNOTATIONS for name in [*names, *(name for one in some for name in folders(one))]):
        yield (
            "boxes and masks (COCO, YOLO, VOC) are not read: a classifier learns a class for each image; write a list, "
            f"path,label in each line (a;b with data.task=multi_label where an image holds several): {LIST_CURE}"
        )
        return
    files = {ending_of(entry.name): place / entry.name for entry in reversed(_entries(place)) if entry.is_file()}
    wanted = FILES if not names else ARCHIVES  # beside folders a .json or .txt is rarely what was meant
    known = [FILES[ending].format(file) for ending, file in files.items() if ending in wanted]
    yield from known[:2]
    loose = [one for one in (place, *some) if candidates.has_loose_images(one)]
    if place in loose or (len(loose) > 1 and any(map(candidates.part_of, names))):
        yield (
            f"these images are in no folder that says their class: move them into such, {place / 'CLASS'}/: "
            f"{_divided(source)}; or write a list of them, path,label in each line: {LIST_CURE}"
        )
    elif len(loose) == 1:
        yield (
            f"a second folder beside {loose[0].name}: each is a class, and a model tells two or more apart: "
            f"{_divided(source)}"
        )
    elif not known:
        yield f"no image is found in it: copy each class's images into {place / 'CLASS'}/: {_divided(source)}"


def _divided(source: Source) -> str:
    divided = replace(source, train=None, val=None, named=None, val_fraction=candidates.VAL_FRACTION)
    return command(divided, source)
