"""The file that names the classes, ``data.classes``."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import UsageError
from launcher.images.walk import composed


def read(path: str) -> list[str]:
    """Names of classes from a file, one a line.

    Raises:
        UsageError: it cannot be read, or a name is there twice.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UsageError(f"data.classes: {file}: {why}; it must hold the names of the classes, one a line") from None
    names: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name = composed(line.strip())
        if name and names.setdefault(name, number) != number:
            raise UsageError(f"data.classes: {file}:{number}: {name!r} is in line {names[name]} too")
    if len(names) < 2:  # noqa: PLR2004
        raise UsageError(
            f"data.classes: {file}: {len(names)} class{'' if names else 'es'}; a classifier tells two or more apart"
        )
    return list(names)


def of_numbers(labels: set[str], names: tuple[str, ...]) -> dict[str, str]:
    """The name of each label, where labels are numbers, from 0, of the lines of the file; else nothing."""
    if not all(label.isascii() and label.isdigit() for label in labels) or any(name.isdigit() for name in names):
        return {}
    return {label: names[int(label)] for label in labels if int(label) < len(names)}
