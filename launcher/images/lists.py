"""Lists of images: a row an image, as CSV, JSON Lines or Parquet."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.errors import UsageError
from launcher.images import class_names, columns
from launcher.images.walk import composed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
MOST_PROBLEMS = 5
SEPARATORS = ";|"
"""Either parts the classes of an image, where the recipe names no other separator."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a list is to be read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """What it calls COLUMNS, where that is something else."""
    several: bool = False
    """An image has any number of classes (``data.task: multi_label``)."""
    separator: str | None = None
    """What parts them in a text; None: any of SEPARATORS."""
    names: tuple[str, ...] = ()
    """Of the classes, where a file has them: labels that are numbers mean its lines, from 0."""


class Row(NamedTuple):
    """An image of a list."""

    path: str
    """Absolute."""
    labels: tuple[str, ...]
    """Its class's name, in composed Unicode; of an image with several those of all, sorted, or none."""
    split: str
    """Empty: the list has no such column."""
    group: str
    """The same."""
    line: int
    """Of the file, from 1; of Parquet the number of the row."""
    weight: float | None = None
    """What its loss counts beside others'; None: the list has no such column."""


class ListError(UsageError):
    """A list cannot be read; ``problems`` names each line."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class ColumnsError(ListError):
    """A list lacks the columns that it needs; ``guesses`` are what they may be called."""

    def __init__(self, problems: Sequence[str], guesses: Mapping[str, str]) -> None:
        super().__init__(problems)
        self.guesses = dict(guesses)


def is_list(path: Path) -> bool:
    """Whether a path is that of a list, by its ending."""
    return path.suffix.lower() in ENDINGS and path.is_file()


def read(file: Path, form: Form) -> tuple[Row, ...]:
    """The rows of a list. Paths in it are relative to its own folder.

    Args:
        file: the list.
        form: how.

    Raises:
        ListError: it cannot be read, or rows are wrong; names the file and the lines.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise ListError([f"{file}: {error.strerror}"]) from None
    renamed = tuple(sorted(form.columns.items()))
    return _read(file.absolute(), renamed, form.several, form.separator, form.names, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=4)
def _read(
    file: Path,
    renamed: tuple[tuple[str, str], ...],
    several: bool,  # noqa: FBT001  a key of the cache
    separator: str | None,
    named: tuple[str, ...],
    _changed: int,
    _size: int,
) -> tuple[Row, ...]:
    """Once a process, while the file stays as it is: a list may have a million rows."""
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    names = {column: column for column in columns.COLUMNS} | dict(renamed)
    if file.suffix.lower() not in readers:  # of CSV the names in the first line are stripped, too
        names = {column: columns.stripped(name) for column, name in names.items()}
    split = re.compile(re.escape(separator) if separator else f"[{SEPARATORS}]") if several else None
    where, rows = str(file), list[Row]()
    problems: list[str] = []
    lines: dict[str, int] = {}
    try:
        for line, values in readers.get(file.suffix.lower(), _read_csv)(file, names):
            row = _row(where, line, values, names, split)
            if isinstance(row, Row) and lines.setdefault(row.path, line) != line:
                path = columns.value(names["path"], values)
                row = f"{file}:{line}: {path} is in line {lines[row.path]} too; an image has one row"
            if isinstance(row, Row):
                rows.append(row)
            else:
                problems.append(row)
    except UnicodeDecodeError as error:
        raise ListError([f"{file}: is not UTF-8 text (byte {error.start}): save it as UTF-8"]) from None
    except OSError as error:
        raise ListError([f"{file}: {error.strerror or error}"]) from None
    problems += _uneven(file, rows, names)
    if problems:
        more = len(problems) - MOST_PROBLEMS
        raise ListError([*problems[:MOST_PROBLEMS], *([f"{file}: {more} more lines like these"] if more > 0 else [])])
    if not rows:
        raise ListError([f"{file}: has no rows"])
    return tuple(_with_names(rows, named) if named else rows)


def _with_names(rows: list[Row], names: tuple[str, ...]) -> list[Row]:
    """The same; where labels are numbers and classes have names, with these."""
    known = class_names.of_numbers({label for row in rows for label in row.labels}, names)
    return [row._replace(labels=tuple(sorted(known.get(label, label) for label in row.labels))) for row in rows]


def _row(
    file: str, line: int, values: Mapping[str, Any], names: Mapping[str, str], separator: re.Pattern[str] | None
) -> Row | str:
    """A row; text: what is wrong with it."""
    said = {column: columns.value(name, values) for column, name in names.items()}
    if columns.holds_images(said["path"]):
        return f"{file}:{line}: {names['path']} {columns.HOLDS_IMAGES}"
    texts = {column: "" if value is None else str(value).strip() for column, value in said.items()}
    needed = ["path"] if separator and names["label"] in values else ["path", "label"]
    optional = [column for column in ("split", "group", "weight") if names[column] in values]
    empty = [names[column] for column in (*needed, *optional) if not texts[column]]
    if empty:
        cure = "; of an image that has no class it is empty" if separator and names["label"] in empty else ""
        return f"{file}:{line}: no {' and no '.join(empty)} in this row{cure}"
    try:
        labels = _labels(said["label"], separator)
        weight = _weight(said["weight"]) if names["weight"] in values else None
    except _CellError as error:
        return f"{file}:{line}: {names[error.column]} is {said[error.column]!r}; {error}"
    own = os.path.expanduser(texts["path"]) if texts["path"].startswith("~/") else texts["path"]  # noqa: PTH111
    path = os.path.normpath(os.path.join(os.path.dirname(file), own))  # noqa: PTH118, PTH120  as often as there are rows
    return Row(path, labels, texts["split"], texts["group"], line, weight)


def _uneven(file: Path, rows: Sequence[Row], names: Mapping[str, str]) -> Iterator[str]:
    """Rows of JSON that lack what others say: without a split they would be in none."""
    for column in ("split", "group", "weight"):
        without = [row.line for row in rows if getattr(row, column) in ("", None)]
        if len(without) < len(rows):
            yield from (f"{file}:{line}: no {names[column]} in this row, and others have one" for line in without)


class _CellError(Exception):
    """What a row says in a column cannot be; words that follow it."""

    def __init__(self, column: str, valid: str) -> None:
        super().__init__(valid)
        self.column = column


def _labels(said: Any, separator: re.Pattern[str] | None) -> tuple[str, ...]:
    """The classes of an image: one, or with a ``separator`` any number of them, sorted."""
    if separator is None:
        if isinstance(said, dict | list):
            raise _CellError("label", "an image has one class, a text or a number (several: data.task=multi_label)")
        return (composed(str(said).strip()),)
    found = said
    if isinstance(said, str):
        text = said.strip()
        found = _json_list(text) if text.startswith("[") else separator.split(text)
    found = [] if found is None else found if isinstance(found, list) else [found]
    if any(one is None or isinstance(one, dict | list | bool | float) for one in found):
        valid = 'the names or numbers of an image\'s classes, as in a;b or ["a", "b"]'
        raise _CellError("label", valid)
    names = sorted(name for one in found if (name := composed(str(one).strip())))
    if len(set(names)) < len(names):
        raise _CellError("label", "each of an image's classes once (a 0 or 1 for each class of all is not read)")
    return tuple(names)


def _json_list(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _CellError("label", f"it begins as a list in JSON and is none: {error}") from None


def _weight(said: Any) -> float:
    try:
        weight = math.nan if isinstance(said, bool) else float(said)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise _CellError("weight", "a finite number, 0 or more")
    return weight


def _check_columns(
    file: Path, found: Sequence[str], names: Mapping[str, str], row: Mapping[str, Any], line: int = 1
) -> None:
    """Whether a list has the columns that it needs; ``row`` is its first, by which they are guessed."""
    if lacking := columns.lacking(found, names, row):
        problem, guesses = lacking
        raise ColumnsError([f"{file}:{line}: {problem}"], guesses)


def _read_csv(file: Path, names: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        empty = 0  # lines above the names
        while (first := stream.readline()) and not first.strip():
            empty += 1
        usual = max(",;\t", key=first.count)  # before |, which may stand in a name
        delimiter = "|" if "|" in first and usual not in first else usual
        stream.seek(0)
        reader = csv.DictReader(  # "" may be a column, as of pandas' index
            itertools.islice(stream, empty, None), delimiter=delimiter, restkey=None, skipinitialspace=True
        )
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            for number, row in enumerate(reader):
                line = empty + reader.line_num
                if not number:
                    _check_columns(file, reader.fieldnames, names, row, empty + 1)
                if row.get(None):
                    what = f"{len(row[None])} more fields than the first line names"
                    raise ListError([f"{file}:{line}: {what}; put what holds a {delimiter!r} into quotes"])
                # None: the line ends before it, which is not the same as an empty one.
                if row.get(names["label"], "") is None:
                    del row[names["label"]]
                yield line, row
            _check_columns(file, reader.fieldnames, names, {}, empty + 1)
        except csv.Error as error:
            raise ListError([f"{file}:{empty + reader.line_num}: {error}"]) from None


def _read_jsonl(file: Path, names: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig") as stream:
        is_first = True
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ListError(
                    [f"{file}:{line}: is no JSON: {error.msg} (character {error.pos + 1} of the line)"]
                ) from None
            if not isinstance(row, dict):
                cure = (
                    f"; `jq -c '.[]' {file.name} > rows.jsonl` makes lines of a list" if isinstance(row, list) else ""
                )
                raise ListError([f'{file}:{line}: is no JSON object; a row is {{"path": …, "label": …}}{cure}'])
            if is_first:
                _check_columns(file, list(row), names, row, line)
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
            heavy = {one.name: unread for one in table.schema_arrow if (unread := _unread(one.type)) is not None}
            if columns.lacking(there, names, {}):
                light = [one for one in there if one not in heavy]
                head = next(table.iter_batches(batch_size=1, columns=light), None)
                row = heavy | (head.to_pylist()[0] if head is not None and head.num_rows else {})
                _check_columns(file, there, names, row)
            for name in columns.fields(names["path"], there):
                if heavy.get(name) == b"":
                    raise ListError([f"{file}: {name} {columns.HOLDS_IMAGES}"])
            needed = {one for name in names.values() for one in columns.fields(name, there) if one in there}
            first = 1
            for batch in table.iter_batches(columns=sorted(needed)):
                yield from enumerate(batch.to_pylist(), start=first)
                first += batch.num_rows
    except ArrowInvalid as error:
        raise ListError([f"{file}: is no Parquet: {error}"]) from None


def _unread(kind: Any) -> Any:
    """What stands for a cell of Parquet that may be large: a list, or bytes; None: it is read."""
    from pyarrow import types

    if (types.is_list(kind) or types.is_large_list(kind)) and _unread(kind.value_type) is None:
        return []
    return b"" if types.is_nested(kind) or "binary" in str(kind) else None


def sorted_labels(labels: set[str]) -> list[str]:
    """The names of classes in their order: numbers by value, texts as folders are sorted."""
    if all(label.isascii() and label.isdigit() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))  # 1 and 01 are two classes
    return sorted(labels)
