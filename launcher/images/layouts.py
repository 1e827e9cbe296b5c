"""Finds out how a folder or a list holds images: which part of it is for training, which for validation.

What is found by itself is unambiguous; the rest is for ``data.train``, ``data.val`` and ``data.val_fraction`` to say.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.images import class_names, lists
from launcher.images.parts import ClassFolders, ListRows
from launcher.images.walk import class_folders, composed, ending_of, has_image, is_hidden, is_image

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from launcher.images.parts import Part

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
    "a data set of Hugging Face's saved on disk (save_to_disk), or its image folders with metadata.csv or .jsonl",
    "torchvision's, data.name=CIFAR10 (`launch schema` has them all); your own, data.dataset=file.py:name",
)
"""The layouts, a line each."""
METADATA = "metadata"
"""What the list of a folder of images is called by Hugging Face; its column file_name is the path."""
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".xz")
NUM_NAMED = 8
MOST_LEVELS, NUM_SEARCHED = 4, 32
"""How deep, and in how many folders of a level, images are looked for, to say where they are."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where images are, as a recipe says."""

    path: str
    """A folder or a list."""
    train: str | None = None
    """As ``data.train``, and so on."""
    val: str | None = None
    test: str | None = None
    val_fraction: float | None = None
    group: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    classes: str | None = None
    several: bool = False
    """Whether an image has any number of classes (``data.task: multi_label``)."""
    separator: str | None = None
    seed: int = 0
    """The recipe's."""
    named: str | None = None
    """What the user calls it, where ``path`` is a list that was written of it."""

    @property
    def label(self) -> str:
        """For messages."""
        return self.named or self.path

    @functools.cached_property
    def form(self) -> lists.Form:
        """How lists are read; ``data.group`` may name a column."""
        columns = {**self.columns, **({"group": self.group} if self.group else {})}
        names = tuple(class_names.read(self.classes)) if self.classes else ()
        return lists.Form(columns=columns, several=self.several, separator=self.separator, names=names)

    @property
    def place(self) -> Path:
        """The folder or the list."""
        return Path(self.path).expanduser()

    @property
    def root(self) -> Path:
        """The folder that images are known by their paths below."""
        return self.place.parent if lists.is_list(self.place) else self.place


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
            f"{source.label}: {val.place.name} is there for validation: leave data.val_fraction out, or name what is "
            "to be divided alone as data.path"
        )
    else:
        layout.undivided = _without(test, train or _whole(source), layout)
        names = set() if train or not layout.undivided else {name.lower() for name in layout.undivided.class_names}
        if names and names <= {*TRAIN, *VAL, *TEST, *OTHER_NAMES["train"], *OTHER_NAMES["val"]}:
            layout.problems.append(f"{source.label}: {' and '.join(sorted(names))} are no classes{explain(source)}")
    layout.parts |= _there(test=test)
    chosen = [(key, part) for key, part in (("data.train", train), ("data.val", val), ("data.test", test)) if part]
    for (one, part), (other, same) in combinations(chosen, 2):
        if part == same:
            name = getattr(part, "split", None) or part.place.name
            layout.problems.append(f"{source.label}: {one} and {other} are both {name}")
    return layout


def nothing_at(source: Source) -> str:
    """That a path leads to nothing that images can be read from."""
    return f"{source.label}: no such folder or list"


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
    if class_folders(folder):
        return ClassFolders(folder)
    tables = (folder / f"{METADATA}{ending}" for ending in lists.ENDINGS)
    table = next((file for file in tables if file.is_file()), None)
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
    if works := list(_works(source)):
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
    entries = sorted(entry for entry in place.iterdir() if not is_hidden(entry.name))
    return {entry.name: entry for entry in entries if entry.is_dir()}


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
