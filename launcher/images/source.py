"""Where a data set is, as a recipe or a command line says."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.images import class_names, lists

if TYPE_CHECKING:
    from collections.abc import Mapping


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
