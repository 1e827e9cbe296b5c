"""The columns of a list: what they are called, what they probably mean, and a path that is put together of several."""

from __future__ import annotations

import difflib
import json
import os
import re
from typing import TYPE_CHECKING, Any

from launcher.images.walk import is_hidden, is_image

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

COLUMNS = ("path", "label", "split", "group", "weight")
"""What a list can say of an image; the first two it has to."""
OTHER_NAMES = {
    "path": (
        *("file", "file_name", "filename", "filepath", "file_path", "filenames", "files", "paths", "name", "id"),
        *("image", "images", "image_path", "image_name", "image_file", "image_id"),
        *("img", "img_path", "img_name", "photo"),
    ),
    "label": (
        *("class", "labels", "target", "category", "class_name", "class_id"),
        *("classname", "label_name", "tags", "y"),
    ),
}
"""What people call the columns: named in messages, never taken without being asked for."""
FIELD = re.compile(r"\{([^{}]+)\}")
"""A column in a path that is put together, as in ``images/{id}.jpg``."""
ENDINGS = ("", ".jpg", ".jpeg", ".png", ".JPG", ".webp", ".tif", ".bmp")
HOLDS_IMAGES = (
    "holds no path of a file but the image itself: write the images as files and give their paths, or save the data "
    "set by Hugging Face's save_to_disk"
)
NUM_SEARCHED, NUM_ROWS = 64, 3
"""Look into so many folders, for the files of so many rows."""


def fields(name: str, found: Sequence[str]) -> list[str]:
    """The columns that a name of ``data.columns`` means: itself, or those in its braces."""
    return [name] if name in found or not FIELD.search(name) else FIELD.findall(name)


def stripped(name: str) -> str:
    """A name of ``data.columns`` without spaces around it, and around those in its braces."""
    return FIELD.sub(lambda match: f"{{{match[1].strip()}}}", name.strip())


def value(name: str, row: Mapping[str, Any]) -> Any:
    """What a row says in a column, or in the columns in its braces; None where one of them is empty."""
    if name in row or "{" not in name:
        return row.get(name)
    parts = {field: row.get(field) for field in FIELD.findall(name)}
    if any(part is None or not str(part).strip() for part in parts.values()):
        return None
    return FIELD.sub(lambda match: str(parts[match[1]]).strip(), name)


def guess(missing: Sequence[str], found: Sequence[str], row: Mapping[str, Any]) -> dict[str, str]:
    """Which columns path and label probably are.

    Args:
        missing: those of the two that are looked for.
        found: what the list has.
        row: its first; empty: it has none.
    """
    guesses: dict[str, str] = {}
    valid = {
        "path": [name for name in found if not isinstance(row.get(name), bytes | dict | list)],
        "label": [name for name in found if not isinstance(row.get(name), bytes | dict)],
    }
    for column in missing:
        known = (column, *OTHER_NAMES[column])
        by_name = sorted((known.index(_plain(name)), name) for name in valid[column] if _plain(name) in known)
        if by_name:
            guesses[column] = by_name[0][1]
        elif column == "path":
            by_file = [name for name in valid[column] if is_image(str(row.get(name)))]
            guesses |= {"path": by_file[0]} if by_file else {}
    left = [name for name in valid["label"] if name and name not in (guesses.get("path"), *COLUMNS)]
    if (
        "label" in missing
        and "label" not in guesses
        and len(left) == 1
        and ("path" in guesses or "path" not in missing)
    ):
        guesses["label"] = left[0]
    return guesses


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def holds_images(said: Any) -> bool:
    """Whether a cell is no path but the bytes of an image, or the mapping that Hugging Face's libraries write."""
    return isinstance(said, bytes | dict)


def lacking(
    found: Sequence[str], names: Mapping[str, str], row: Mapping[str, Any]
) -> tuple[str, dict[str, str]] | None:
    """Why a list cannot be read with these names of columns, and what they probably are; None: it can."""
    missing = [column for column in ("path", "label") if not set(fields(names[column], found)) <= set(found)]
    if not missing:
        return None
    if not found:
        return "is empty: its first line has to name the columns, as path,label", {}
    if any(is_image(str(name)) and os.path.splitext(str(name))[0] for name in found):  # noqa: PTH122
        shown = ", ".join(map(str, found[:4]))
        return f"its first line is a row, and names no columns ({shown}): put path,label above it", {}
    lost = [one for column in missing for one in fields(names[column], found) if one not in found]
    guesses = guess(missing, [name for name in found if name not in names.values()], row)
    for column in missing:
        near = difflib.get_close_matches(names[column], map(str, found), n=1) if names[column] != column else []
        if near:
            guesses[column] = near[0]
    held = [name for name in found if holds_images(row.get(name)) and _plain(name) in OTHER_NAMES["path"]]
    if "path" in missing and "path" not in guesses and held:
        return f"no column 'path', and {held[0]} {HOLDS_IMAGES}", {}
    given = {column: names[column] for column in ("path", "label") if names[column] != column}
    renamed = as_keys({**given, **{column: guesses.get(column, "COLUMN") for column in missing}})
    lacks = " and no ".join(f"column {one!r}" for one in lost)
    has = ", ".join(map(str, found[:12])) or "none"
    return f"no {lacks} (there are: {has}); say which it is: '{renamed}'", guesses


def as_keys(columns: Mapping[str, str]) -> str:
    """Columns as a key of a recipe on the command line, without the quotes that a shell needs."""
    quoted = {
        column: json.dumps(name, ensure_ascii=False) if re.search(r"[^\w-]", name) else name
        for column, name in columns.items()
    }
    return f"data.columns={{{', '.join(f'{column}: {name}' for column, name in quoted.items())}}}"


def find_path(
    folder: Path, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], *, first: str = ""
) -> str | None:
    """How the columns of a list's rows would have to be put together to name files that are there; None: not found.

    Args:
        folder: where the list is.
        rows: some of them, by what the list calls its columns.
        names: what it calls path, label and split.
        first: the folder to look into before others, as train for train.csv.
    """
    if not rows or not all(str(row.get(names["path"]) or "").strip() for row in rows):
        return None
    between = ["", *(f"{{{names[column]}}}/" for column in ("label", "split") if rows[0].get(names[column]))]
    if len(between) > 2:  # noqa: PLR2004
        between.append(between[2] + between[1])
    tried = (
        f"{start}{middle}{{{names['path']}}}{ending}"
        for start in sorted(_folders(folder), key=lambda start: (bool(start), start.split("/")[0] != first))
        for middle in between
        for ending in ENDINGS
    )
    return next((name for name in tried if all(os.path.isfile(folder / str(value(name, row))) for row in rows)), None)  # noqa: PTH113


def _folders(folder: Path) -> Iterator[str]:
    """The folder, those in it, and those in these, as starts of a path."""
    yield ""
    level = [""]
    for _ in range(2):
        level = [f"{start}{name}/" for start in level for name in _names(folder / start)][:NUM_SEARCHED]
        yield from level


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
    except OSError:
        return []
