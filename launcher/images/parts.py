"""What holds images with their classes: a folder of class folders, or rows of a list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from launcher.images import folder as image_folder
from launcher.images import left_out, lists

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from launcher.images.lists import Form, Row


class Found(NamedTuple):
    """An image that was found."""

    path: str
    labels: tuple[str, ...]
    """The name of its class; where images have several those of all, or none."""
    group: str = ""
    """What a list says of it."""
    weight: float | None = None
    """The same."""


@dataclass(frozen=True)
class ClassFolders:
    """A folder with a folder for each class."""

    place: Path
    beside: str | None = None
    """The folder among them that is no class: the test set's."""

    @property
    def class_names(self) -> list[str]:
        """Sorted."""
        return [name for name in image_folder.find_classes(self.place) if name != self.beside]

    def images(self, classes: Sequence[str]) -> list[Found]:
        """Those of some classes, by class and path; the others are left out."""
        names = list(classes)
        return [Found(path, (names[label],)) for path, label in image_folder.list_images(self.place, names)]

    def left_out(self, classes: Sequence[str]) -> list[str]:
        """What of it is no image, in words."""
        return left_out.describe_left_out(self.place, image_folder.walk(self.place, list(classes))[1])


@dataclass(frozen=True)
class ListRows:
    """Rows of a list, which is read when it is needed."""

    place: Path
    """The list."""
    form: Form
    """How it is read."""
    split: str | None = None
    """The value of its column split; None: all rows."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """In the order of the list.

        Raises:
            ListError: it cannot be read.
        """
        found = lists.read(self.place, self.form)
        return found if self.split is None else tuple(row for row in found if row.split == self.split)

    @property
    def class_names(self) -> list[str]:
        """In their order."""
        return lists.sorted_labels({name for row in self.rows for name in row.labels})

    def images(self, classes: Sequence[str]) -> list[Found]:
        """Those of some classes, by class and path, whatever the order of the rows; of several classes all images."""
        places = {name: place for place, name in enumerate(classes)}
        known = []
        for row in self.rows:
            labels = tuple(sorted((name for name in row.labels if name in places), key=places.__getitem__))
            if labels or self.form.several:
                order = tuple(places[name] for name in labels), row.path
                known.append((order, Found(row.path, labels, row.group, row.weight)))
        return [found for _, found in sorted(known, key=lambda one: one[0])]

    def left_out(self, classes: Sequence[str]) -> list[str]:  # noqa: ARG002  as of a folder
        """Nothing: a list says what is meant."""
        return []


Part = ClassFolders | ListRows
