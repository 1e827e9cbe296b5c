"""Files that a list names and that are not there: which, and what would find them."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.errors import UsageError
from launcher.images import columns, members
from launcher.images.folder import printable
from launcher.images.parts import ListRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.images.lists import Row
    from launcher.images.parts import Part

NUM_SHOWN = 5


def find_problems(part: Part) -> Iterator[str]:
    """Why not all files of a list can be read."""
    gone = [row for row in part.rows if not members.exists(row.path)] if isinstance(part, ListRows) else []
    if not gone or not isinstance(part, ListRows):
        return
    place = part.place
    lines = [(row.line, printable(row.path).replace("\n", "\\n")) for row in gone[:NUM_SHOWN]]
    shown = "".join(f"\n    {place}:{line}: no file {path}" for line, path in lines)
    yield (
        f"{place}: {len(gone)} of {len(part.rows)} files are not there; paths are relative to the list's folder, "
        f"{place.absolute().parent}{_cure(part, gone)}{shown}"
    )


def _cure(part: ListRows, gone: Sequence[Row]) -> str:
    """What would find them, as words that go on."""
    first = gone[0].path
    if "\n" in first:
        return "; these run over several lines: a quotation mark is not closed"
    told = os.path.relpath(first, part.place.absolute().parent)
    if re.match(r"[A-Za-z]:[\\/]", told):
        return "; these are on a drive of Windows: give paths relative to the list"
    if re.search(r"[A-Za-z]\w+:/", told):
        return "; these are addresses: download the images, and give the paths of the files"
    if "\\" in first:
        return "; write / for \\"
    return _new_form(part, gone)


def _new_form(part: ListRows, gone: Sequence[Row]) -> str:
    """Columns that would put the paths together, tried on all rows."""
    name = find_path(part, gone) if len(gone) == len(part.rows) else None  # what mends some may lose others
    if not name:
        return ""
    named = {**part.form.columns, "path": name}
    try:
        rows = replace(part, form=replace(part.form, columns=named)).rows
    except UsageError:
        return ""
    there = sum(members.exists(row.path) for row in rows)
    are = "they are" if there == len(rows) else f"{there} of {len(rows)} are there"
    return f"; with {shlex.quote(columns.as_keys(named))} {are}"


def find_path(part: ListRows, rows: Sequence[Row]) -> str | None:
    """How the columns of a list would have to be put together to name files that are there."""
    names = {column: part.form.columns.get(column, column) for column in columns.COLUMNS}
    if any("{" in name for name in names.values()):
        return None
    folder = part.place.absolute().parent
    told = [
        {
            names["path"]: os.path.relpath(row.path, folder),
            names["label"]: row.labels[0] if len(row.labels) == 1 else None,
            names["split"]: row.split,
        }
        for row in rows[: columns.NUM_ROWS]
    ]
    return columns.find_path(folder, told, names, first=part.place.stem)
