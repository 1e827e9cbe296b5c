"""Lists of images: a row an image, as CSV, JSON Lines or Parquet."""

from __future__ import annotations

import csv
import functools
import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.errors import UsageError
from launcher.images.walk import composed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
COLUMNS = ("path", "label", "split", "group")
"""What a list can say of an image; the first two it has to."""
OTHER_NAMES = {
    "path": ("file", "file_name", "filename", "image", "image_path", "filepath", "file_path", "img", "name", "id"),
    "label": ("class", "target", "category", "class_name", "labels", "y"),
}
"""What people call the columns: named in messages, never taken without being asked for."""
MOST_PROBLEMS = 5


class Row(NamedTuple):
    """An image of a list."""

    path: str
    """Absolute."""
    label: str
    """Its class's name, in composed Unicode."""
    split: str
    """Empty: the list has no such column."""
    group: str
    """The same."""
    line: int
    """Of the file, from 1; of Parquet the number of the row."""


class ListError(UsageError):
    """A list cannot be read; ``problems`` names each line."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def is_list(path: Path) -> bool:
    """Whether a path is that of a list, by its ending."""
    return path.suffix.lower() in ENDINGS and path.is_file()


def read(file: Path, columns: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows of a list. Paths in it are relative to its own folder.

    Args:
        file: the list.
        columns: what it calls COLUMNS, where that is something else.

    Raises:
        ListError: it cannot be read, or rows are wrong; names the file and the lines.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise ListError([f"{file}: {error.strerror}"]) from None
    return _read(file.absolute(), tuple(sorted(columns.items())), found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=4)
def _read(file: Path, renamed: tuple[tuple[str, str], ...], _changed: int, _size: int) -> tuple[Row, ...]:
    """Once a process, while the file stays as it is: a list may have a million rows."""
    names = {column: column for column in COLUMNS} | dict(renamed)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    where, rows = str(file), list[Row]()
    problems: list[str] = []
    lines: dict[str, int] = {}
    try:
        for line, values in readers.get(file.suffix.lower(), _read_csv)(file, names):
            row = _row(where, line, values, names)
            if isinstance(row, Row) and lines.setdefault(row.path, line) != line:
                row = f"{file}:{line}: {values[names['path']]} is in line {lines[row.path]} too; an image has one row"
            if isinstance(row, Row):
                rows.append(row)
            else:
                problems.append(row)
    except UnicodeDecodeError as error:
        raise ListError([f"{file}: is not UTF-8 text (byte {error.start}): save it as UTF-8"]) from None
    except OSError as error:
        raise ListError([f"{file}: {error.strerror or error}"]) from None
    if problems:
        more = len(problems) - MOST_PROBLEMS
        raise ListError([*problems[:MOST_PROBLEMS], *([f"{file}: {more} more lines like these"] if more > 0 else [])])
    if not rows:
        raise ListError([f"{file}: has no rows"])
    return tuple(rows)


def _row(file: str, line: int, values: Mapping[str, Any], names: Mapping[str, str]) -> Row | str:
    """A row; text: what is wrong with it."""
    said = {column: values.get(name) for column, name in names.items()}
    texts = {column: "" if value is None else str(value).strip() for column, value in said.items()}
    optional = [column for column in ("split", "group") if names[column] in values]
    empty = [names[column] for column in ("path", "label", *optional) if not texts[column]]
    if empty:
        return f"{file}:{line}: no {' and no '.join(empty)} in this row"
    if isinstance(said["label"], dict | list):
        return f"{file}:{line}: {names['label']} is {said['label']!r}; an image has one class, a text or a number"
    path = os.path.normpath(os.path.join(os.path.dirname(file), texts["path"]))  # noqa: PTH118, PTH120  as often as there are rows
    return Row(path, composed(texts["label"]), texts["split"], texts["group"], line)


def _check_columns(file: Path, found: Sequence[str], names: Mapping[str, str], line: int = 1) -> None:
    missing = [column for column in ("path", "label") if names[column] not in found]
    if not missing:
        return
    guesses = {column: guess for column in missing for guess in found if str(guess).lower() in OTHER_NAMES[column]}
    renamed = ", ".join(f"{column}: {guesses.get(column, 'COLUMN')}" for column in missing)
    lacks = " and no ".join(f"column {names[column]!r}" for column in missing)
    has = ", ".join(map(str, found[:12])) or "none"
    raise ListError([f"{file}:{line}: no {lacks} (there are: {has}); say which it is: 'data.columns={{{renamed}}}'"])


def _read_csv(file: Path, names: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        first = stream.readline()
        stream.seek(0)
        delimiter = max(",;\t", key=first.count)
        reader = csv.DictReader(stream, delimiter=delimiter, restkey=None)  # "" may be a column, as of pandas' index
        try:
            _check_columns(file, reader.fieldnames or [], names)
            for row in reader:
                if row.get(None):
                    what = f"{len(row[None])} more fields than the first line names"
                    raise ListError([f"{file}:{reader.line_num}: {what}; put what holds a {delimiter!r} into quotes"])
                yield reader.line_num, row
        except csv.Error as error:
            raise ListError([f"{file}:{reader.line_num}: {error}"]) from None


def _read_jsonl(file: Path, names: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig") as stream:
        is_first = True
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ListError([f"{file}:{line}: is no JSON: {error}"]) from None
            if not isinstance(row, dict):
                raise ListError([f'{file}:{line}: is no JSON object; a row is {{"path": …, "label": …}}'])
            if is_first:
                _check_columns(file, list(row), names, line)
                is_first = False
            yield line, row


def _read_parquet(file: Path, names: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ListError([f"{file}: Parquet needs pyarrow: pip install pyarrow; .csv and .jsonl need nothing"]) from None
    try:
        with parquet.ParquetFile(file) as table:
            there = table.schema_arrow.names
            _check_columns(file, there, names)
            first = 1
            for batch in table.iter_batches(columns=[name for name in names.values() if name in there]):
                yield from enumerate(batch.to_pylist(), start=first)
                first += batch.num_rows
    except ArrowInvalid as error:
        raise ListError([f"{file}: is no Parquet: {error}"]) from None


def sorted_labels(labels: set[str]) -> list[str]:
    """The names of classes in their order: numbers by value, texts as folders are sorted."""
    return sorted(labels, key=int) if all(label.isascii() and label.isdigit() for label in labels) else sorted(labels)
