"""The images of a data set, listed by split, however they are laid out; the one road for all who ask for them."""

from __future__ import annotations

import functools
import re
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING

from launcher.errors import UsageError
from launcher.images import candidates, class_names, division, gone, known_layouts, layouts, lists
from launcher.images import folder as image_folder
from launcher.images.parts import ClassFolders, ListRows
from launcher.images.source import Source
from launcher.images.walk import composed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from launcher.images.parts import Found, Part

SPLITS, TEST = image_folder.SPLITS, "test"
Label = int | tuple[int, ...]
"""The class of an image by its place; where it has any number of them, a sorted tuple."""


class Listing:
    """The images of a data set.

    Args:
        source: where they are.
        classes: names in the order of the logits; None: as ``data.classes`` says, or those of the training images.

    Raises:
        UsageError: nothing can be read there.
    """

    def __init__(self, source: Source, classes: Sequence[str] | None = None) -> None:
        self.source = source
        self.root = source.root
        self.layout = layouts.find(source)
        self._classes = None if classes is None else list(classes)
        self._listed: dict[tuple[str, ...], list[Found]] = {}
        """By split (empty: divided here) and the classes asked for, so that nothing is walked through twice."""

    @classmethod
    def of_folder(cls, folder: Path, classes: Sequence[str] | None = None) -> Listing:
        """Of a folder that holds train/ and val/."""
        return cls(Source(path=str(folder)), classes)

    def with_classes(self, classes: Sequence[str]) -> Listing:
        """The same with other classes, or their order; it is divided once for both."""
        made = Listing(self.source, classes)
        if self.layout.undivided:
            made._validated, made._listed = self._validated, self._listed
        return made

    @cached_property
    def classes(self) -> list[str]:
        """Names in the order of the logits."""
        if self._classes is not None:
            return self._classes
        if self.source.classes:
            return class_names.read(self.source.classes)
        return self.trained.class_names

    @property
    def trained(self) -> Part:
        """What training images are, or are taken from."""
        part = self.layout.undivided or self.layout.parts.get("train")
        if part is None:
            raise UsageError(self.why_not("train"))
        return part

    def why_not(self, split: str) -> str:
        """Why there is nothing of a split."""
        found = self.layout.problems or [f"{self.source.label}: no {split}/ in it"]
        return "; ".join(found)

    def part(self, split: str) -> Part | None:
        """What a split is, or is taken from; None: there is none."""
        if self.layout.undivided and split in SPLITS:
            return self.layout.undivided
        found = self.layout.parts.get(split)
        folder = self.root / split
        return found or (ClassFolders(folder) if split not in SPLITS and folder.is_dir() else None)

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that a run looks at."""
        return (*SPLITS, TEST) if self.source.test else SPLITS

    @property
    def used(self) -> list[Part]:
        """What training and validation are, or are taken from."""
        parts = [part for split in SPLITS if (part := self.part(split))]
        return parts if len(parts) < len(SPLITS) or parts[0] is not parts[1] else parts[:1]

    def samples(self, split: str) -> list[tuple[str, Label]]:
        """Path and class of each image of a split, in the same order on every machine; of unknown classes none.

        Where an image has any number of classes, a sorted tuple of them.

        Raises:
            UsageError: there is no such split.
        """
        places = {composed(name): place for place, name in enumerate(self.classes)}
        several = self.source.several
        return [
            (image.path, labels if several else labels[0])
            for image in self._images(split)
            for labels in [tuple(sorted(places[composed(name)] for name in image.labels))]
        ]

    def weights(self, split: str) -> list[float] | None:
        """What each of the :meth:`samples` counts, as a list says; None: nothing says so."""
        found = [image.weight for image in self._images(split)]
        return None if None in found or not found else [weight for weight in found if weight is not None]

    def _images(self, split: str) -> list[Found]:
        part = self.part(split)
        if part is None:
            raise UsageError(self.why_not(split))
        found = self._list(split, self.classes)
        if part is self.layout.undivided:
            found = [image for image in found if (image.path in self._validated) == (split == "val")]
        return found

    def _list(self, split: str, classes: Sequence[str]) -> list[Found]:
        """All images of some classes of the part that a split is, or is taken from, which has to be there."""
        part = self.part(split)
        assert part  # noqa: S101
        key = "" if part is self.layout.undivided else split, *classes
        if key not in self._listed:
            self._listed[key] = part.images(classes)
        return self._listed[key]

    def find_empty(self) -> Iterator[str]:
        """Classes without an image in a folder that is divided here; only those are looked into anew."""
        part = self.layout.undivided
        assert isinstance(part, ClassFolders)  # noqa: S101
        names = part.class_names
        full = {name for image in self._list("train", names) for name in image.labels}
        yield from image_folder.find_empty(part.place, [name for name in names if name not in full])

    @cached_property
    def _validated(self) -> frozenset[str]:
        """Paths of what is taken for validation of what is not divided."""
        assert self.layout.undivided  # noqa: S101
        found = self._list("train", self.layout.undivided.class_names)
        chosen = division.divide(
            [self.key(image.path) for image in found],
            [image.labels for image in found],
            self._groups(found),
            fraction=self.source.val_fraction or 0.0,
            seed=self.source.seed,
        )
        return frozenset(found[index].path for index in chosen)

    def _groups(self, found: Sequence[Found]) -> list[str]:
        """What each image belongs to; empty: nothing says so."""
        if any(image.group for image in found):
            return [image.group for image in found]
        if self.source.group is None:
            return []
        try:
            pattern = re.compile(self.source.group)
        except re.error as error:
            text = f"data.group: found {self.source.group!r}; no regular expression: {error}"
            raise UsageError(text) from None
        matches = [(self.key(image.path), pattern.search(self.key(image.path))) for image in found]
        lost = [key for key, match in matches if match is None]
        if lost:
            raise UsageError(
                f"data.group: {self.source.group!r} is in the path of {len(matches) - len(lost)} of {len(matches)} "
                f"images, and not in {image_folder.printable(lost[0])}; each image needs its group"
            )
        return ["/".join(map(str, match.groups())) or match[0] for _, match in matches if match]

    def key(self, path: str) -> str:
        """What an image is known by: its path from the folder, the same wherever the folder is named from."""
        return image_folder.relative(path, self.root)

    def class_names(self, split: str) -> list[str]:
        """The classes that a split has folders or rows of; of what is divided here, all."""
        part = self.part(split)
        return part.class_names if part else []

    def left_out(self) -> Iterator[str]:
        """What lies in the folders and is no image, and what else the user should know, a sentence each."""
        yield from self.layout.notes
        for part in self.used:
            yield from part.left_out(part.class_names)


def each_of(label: Label) -> tuple[int, ...]:
    """The class of an image, or its classes."""
    return (label,) if isinstance(label, int) else label


def every_image_has_all(labels: Sequence[Label], num_classes: int) -> str | None:
    """Why nothing can be learned from these training images, where each has all classes; None: one has not."""
    if not labels or any(len(each_of(label)) < num_classes for label in labels):
        return None
    return (
        f"each of the {len(labels)} training images has all {num_classes} classes, so that there is nothing to tell "
        "apart; where a 0 or 1 for each class is meant, give the classes that an image has instead, as in [1]"
    )


def find_problems(
    source: Source, *, missing_val_classes: str = "error", need_files: bool = True, explained: bool = True
) -> list[str]:
    """The reasons why images cannot be trained on, each with what to do.

    Args:
        source: where they are.
        missing_val_classes: ``allow``: validation may lack some of the classes.
        need_files: whether each file that a list names has to be there.
        explained: whether to look for what would work instead, which may take seconds.
    """
    find = functools.partial(_find_all, missing_val_classes=missing_val_classes, need_files=need_files)

    def try_out(other: Source) -> str | None:
        """What a start would say first of another source; None: it is laid out in no way that is known."""
        try:
            return next(iter(find(other, explain=_stop)), "")
        except (_UnknownError, OSError):  # an OSError: a folder around it that may not be looked into
            return None

    explain = functools.partial(known_layouts.explain, source, candidates.in_time(try_out))
    return find(source, explain=explain if explained else lambda **_: "")


class _UnknownError(Exception):
    """Images are laid out in no way that is known."""


def _stop(**_: bool) -> str:
    raise _UnknownError


def _find_all(source: Source, *, missing_val_classes: str, need_files: bool, explain: Callable[..., str]) -> list[str]:
    try:
        listing = Listing(source)
        problems = list(dict.fromkeys(_find_problems(listing, missing_val_classes, explain, need_files=need_files)))
        return problems or list(_problems_of_test(listing, need_files=need_files))
    except lists.ColumnsError as error:
        return [f"{error}{explain(name_known=False)}"]
    except lists.ListError as error:
        return error.problems
    except UsageError as error:
        return [str(error)]


def _find_problems(
    listing: Listing, missing_val_classes: str, explain: Callable[..., str], *, need_files: bool
) -> Iterator[str]:
    source, layout = listing.source, listing.layout
    parts = [layout.parts.get(split) for split in SPLITS]
    if source.place.is_file() and layout.problems == [layouts.nothing_at(source)]:
        yield f"{source.label}: is no folder and no list ({', '.join(lists.ENDINGS)}){explain()}"
        return
    if not source.place.exists():
        found = known_layouts.around(source.place)
        yield from (f"{text} (found: {found}){explain()}" for text in image_folder.find_problems(source.place))
        return
    if layout.problems:
        yield from layout.problems[:-1]
        yield f"{layout.problems[-1]}{explain() if layout.is_none else ''}"
        return
    if source.several and any(isinstance(part, ClassFolders) for part in listing.used):
        yield (
            f"{source.label}: folders give an image one class; with data.task=multi_label write a list, a row an "
            "image, with path and label (a;b where it has two): launch RECIPE data.path=FILE.csv (.jsonl, .parquet), "
            "or name your own data.dataset (docs/extending.md)"
        )
        return
    folders = [part for part in parts if isinstance(part, ClassFolders)]
    is_listed = lists.is_list(source.place) or any(isinstance(part, ListRows) for part in parts)
    if not layout.undivided and not source.classes and not is_listed:
        names = [part.place.relative_to(listing.root).as_posix() for part in folders]
        splits = (names[0], names[1]) if len(folders) == len(SPLITS) else SPLITS
        problems = image_folder.find_problems(source.place, missing_val_classes=missing_val_classes, splits=splits)
        unknown = len(folders) < len(SPLITS) or not all(part.class_names for part in folders)
        yield from problems[:-1]
        yield from (f"{text}{explain() if unknown else ''}" for text in problems[-1:])
        return
    if layout.undivided is None and None in parts:
        what = " and ".join(split for split, part in zip(SPLITS, parts, strict=True) if part is None)
        found = known_layouts.shown(source, layout.parts)
        yield f"{source.label}: nothing in it is {what} (found {found}){explain()}"
        return
    if isinstance(layout.undivided, ClassFolders) and not source.classes:
        cure = "remove the folder; a run that learned with it goes on with data.classes=FILE, which names it too"
        yield from (f"{text}; {cure}" for text in listing.find_empty())
    if need_files:
        yield from (text for part in listing.used for text in gone.find_problems(part))
    yield from _classes_that_do_not_fit(listing, missing_val_classes)


def _problems_of_test(listing: Listing, *, need_files: bool) -> Iterator[str]:
    """Why the test set, where there is one, cannot be measured."""
    part = listing.part(TEST) if listing.source.test else None
    if part is None:
        return
    unknown = sorted({composed(name) for name in part.class_names} - {composed(name) for name in listing.classes})
    if unknown:
        yield f"{part.place}: {image_folder.few(unknown)} in the test set (data.test) but not in training"
    elif not listing.samples(TEST):
        yield f"{part.place}: no images in the test set (data.test)"
    elif need_files:
        yield from gone.find_problems(part)


def _classes_that_do_not_fit(listing: Listing, missing_val_classes: str) -> Iterator[str]:
    path, classes = listing.source.label, listing.classes
    for part in listing.used:
        names = {composed(name) for name in part.class_names}
        unknown = sorted(names - {composed(name) for name in classes})
        if unknown and listing.source.classes:
            why = f"; its {len(classes)} lines count from 0" if any(map(str.isdigit, unknown)) else ""
            few = image_folder.few(unknown)
            yield f"{part.place}: {few} not in {listing.source.classes}, which data.classes names{why}"
        elif unknown:
            few = image_folder.few(unknown)
            yield f"{path}: {few} in validation but not in training; both must have the same classes"
    samples = {split: listing.samples(split) for split in SPLITS}
    counts = {split: Counter(one for _, label in found for one in each_of(label)) for split, found in samples.items()}
    if len(counts["train"]) < 2 and not listing.source.classes:  # noqa: PLR2004
        yield f"{path}: {len(counts['train'])} class in it; a classifier tells two or more apart"
        return
    if (weights := listing.weights("train")) and not any(weights):
        yield f"{path}: the weights of all training images are 0, so that nothing is learned"
    if problem := every_image_has_all([label for _, label in samples["train"]], len(classes)):
        yield f"{path}: {problem}"
    for split, found in samples.items():
        if not found:
            yield f"{path}: no images for {'training' if split == 'train' else 'validation'}"
    unmeasured = [name for label, name in enumerate(classes) if counts["train"][label] and not counts["val"][label]]
    if counts["val"] and unmeasured and missing_val_classes != "allow":
        why = "; a class with one image or one group has none to spare" if listing.layout.undivided else ""
        yield (
            f"{path}: no validation image of {image_folder.few(unmeasured)}{why}; data.missing_val_classes=allow "
            "learns them unmeasured"
        )
