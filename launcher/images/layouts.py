"""Finds out how a folder or a list holds images: which part of it is for training, which for validation.

What is found by itself is unambiguous; the rest is for ``data.train``, ``data.val`` and ``data.val_fraction`` to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING

from launcher.images import lists
from launcher.images.candidates import TEST, TRAIN, VAL, are_parts, shows_images
from launcher.images.known_layouts import ANNOTATIONS, NO_CLASSES, shown
from launcher.images.parts import ClassFolders, ListRows
from launcher.images.walk import class_folders, composed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from launcher.images.parts import Part
    from launcher.images.source import Source

METADATA = "metadata"
"""What the list of a folder of images is called by Hugging Face; its column file_name is the path."""


@dataclass(kw_only=True)
class Layout:
    """What is for what."""

    parts: dict[str, Part] = field(default_factory=dict)
    """By the name of the split: train, val, and others that are there."""
    undivided: Part | None = None
    """What train and val are to be taken from, where they are not there as such."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, a sentence each."""
    problems: list[str] = field(default_factory=list)
    """Why there is no train or no val."""
    is_none: bool = False
    """Whether it is none of the layouts that are known."""


def find(source: Source) -> Layout:
    """How ``source`` holds its images.

    Raises:
        ListError: a list cannot be read.
    """
    layout = Layout()
    if lists.is_list(source.place):
        named = _of_list(source)
    elif source.place.is_dir():
        named = _of_folder(source.place, source)
    else:
        layout.problems.append(nothing_at(source))
        return layout
    layout.parts = named
    train = _choose(named, source.train, TRAIN, "data.train", source, layout)
    val = _choose(named, source.val, VAL, "data.val", source, layout)
    test = _choose(named, source.test, (), "data.test", source, layout)
    if source.val_fraction is None:
        if val is None and source.val is None and not layout.problems:
            val = _choose(
                {name: part for name, part in named.items() if part != test}, None, TEST, "data.val", source, layout
            )
            if val is not None and train is not None:
                layout.notes.append(_test_note(source))
        layout.parts = named | _there(train=train, val=val)
    elif val is not None:
        layout.problems.append(
            f"{source.label}: {_name_of(val)} is there for validation: leave data.val_fraction out (or write "
            "data.val_fraction=null), or name what is to be divided alone as data.path"
        )
    else:
        layout.undivided = _without(test, train or _whole(source), layout)
    layout.parts |= _there(test=test)
    chosen = [(key, part) for key, part in (("data.train", train), ("data.val", val), ("data.test", test)) if part]
    for (one, part), (other, same) in combinations(chosen, 2):
        if part == same:
            layout.problems.append(f"{source.label}: {one} and {other} are both {_name_of(part)}")
    _refuse_no_classes(source, layout, _there(train=train, val=val))  # the last problem, which is explained
    return layout


def _refuse_no_classes(source: Source, layout: Layout, parts: Mapping[str, Part]) -> None:
    """Folders that are called as parts, or as images and their annotations, are no classes unless a file says so."""
    for part in (layout.undivided, *parts.values()):
        if source.classes or not isinstance(part, ClassFolders):
            continue
        names = part.class_names
        if (not parts and are_parts(names)) or _are_annotated(part.place, names):
            where = source.label if part.place == source.place else part.place
            are = "are no classes" if len(names) > 1 else "is no class"
            cure = "if they are classes, name them in data.classes=FILE, one a line"
            layout.problems.append(f"{where}: {' and '.join(names)} {are}; {cure}")
            layout.is_none = True
            return


def _are_annotated(place: Path, names: Iterable[str]) -> bool:
    """Whether folders are those of images and of files that say what is in them, as in a set for detection."""
    named = {name: name.lower() for name in names}
    notes = [name for name, lower in named.items() if lower in ANNOTATIONS]
    return (
        0 < len(notes) < len(named)
        and {*named.values()} <= NO_CLASSES
        and not any(shows_images(place / name) for name in notes)
    )


def nothing_at(source: Source) -> str:
    """That a path leads to nothing that images can be read from."""
    return f"{source.label}: no such folder or list"


def _name_of(part: Part) -> str:
    return getattr(part, "split", None) or part.place.name


def _there(**parts: Part | None) -> dict[str, Part]:
    return {name: part for name, part in parts.items() if part is not None}


def _test_note(source: Source) -> str:
    return (
        f"{source.label}: validation is test, since there is no val: the best epoch is chosen by the images that "
        "measure it; data.val_fraction=0.1 takes some of train instead"
    )


def _whole(source: Source) -> Part | None:
    """All of a folder or a list."""
    if lists.is_list(source.place):
        rows = lists.read(source.place, source.form)
        return None if rows[0].split else ListRows(source.place, source.form)
    return _open_folder(source.place, source.form)


def _without(test: Part | None, part: Part | None, layout: Layout) -> Part | None:
    """What is divided, without the folder of the test set, which may lie beside the class folders."""
    if test is None or not isinstance(part, ClassFolders):
        return part
    is_table = isinstance(test, ListRows)
    if is_table and test.place.stem != METADATA:  # a list, which has no folder of its own
        return part
    folder = test.place.parent if is_table else test.place
    if folder.parent.resolve() == part.place.resolve():
        return replace(part, beside=composed(folder.name))
    if part.place.resolve() in (folder.resolve(), *folder.resolve().parents):
        layout.problems.append(
            f"data.test: {folder} lies among the images that data.val_fraction divides, so that it would be trained "
            f"on; move it out of {part.place}, or right into it, beside the class folders"
        )
    return part


def _of_list(source: Source) -> dict[str, Part]:
    """The parts of a list by its column split; and a list or folder beside it that ``data.val`` names."""
    rows = lists.read(source.place, source.form)
    splits = dict.fromkeys(row.split for row in rows if row.split)
    found: dict[str, Part] = {name: ListRows(source.place, source.form, name) for name in splits}
    for key in ("val", "test"):
        name = getattr(source, key)
        if name and name not in found and (beside := _open(source.root / name, source.form)):
            found[name] = beside
            if key == "val" and not splits:
                found["train"] = ListRows(source.place, source.form)
    return found


def _of_folder(folder: Path, source: Source) -> dict[str, Part]:
    """Folders of classes and lists that a folder holds under the names of splits, or that the recipe names."""
    known = {*TRAIN, *VAL, *TEST}
    found: dict[str, Part] = {}
    for entry in sorted(folder.iterdir()):
        name = entry.name if entry.is_dir() else entry.stem
        part = _open(entry, source.form) if name.lower() in known else None
        if part and (name not in found or isinstance(part, ListRows)) and not _holds_classes(found.get(name)):
            found[name] = part
    for wanted in filter(None, (source.train, source.val, source.test)):
        if part := _open(folder / wanted, source.form):
            found[wanted] = part
    return found


def _holds_classes(part: Part | None) -> bool:
    return isinstance(part, ClassFolders) and bool(part.class_names)


def _open(place: Path, form: lists.Form) -> Part | None:
    if lists.is_list(place):
        return ListRows(place, form)
    return _open_folder(place, form) or ClassFolders(place) if place.is_dir() else None


def _open_folder(folder: Path, form: lists.Form) -> Part | None:
    """Class folders; or the images that a ``metadata.csv`` among them lists, as Hugging Face has it."""
    names = class_folders(folder)
    tables = (folder / f"{METADATA}{ending}" for ending in lists.ENDINGS)
    table = next((file for file in tables if file.is_file()), None)
    if names and not (table and {name.lower() for name in names} <= NO_CLASSES):
        return ClassFolders(folder)
    return ListRows(table, replace(form, columns={"path": "file_name", **form.columns})) if table else None


def _choose(
    named: Mapping[str, Part], wanted: str | None, usual: Iterable[str], key: str, source: Source, layout: Layout
) -> Part | None:
    """The part that a key names, or the only one of a usual name."""
    if wanted is not None:
        if wanted not in named:
            layout.problems.append(f"{key}: {source.label} holds no {wanted!r} (found {shown(source, named)})")
        return named.get(wanted)
    found = [name for name in named if name.lower() in usual]
    if len(found) > 1:
        layout.problems.append(f"{source.label}: holds {' and '.join(found)}; say which is meant: {key}={found[0]}")
        return None
    return named[found[0]] if found else None
