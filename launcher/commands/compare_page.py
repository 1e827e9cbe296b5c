"""``launch compare --html``: the same table as a page, with a picture of what led to what."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from launcher.errors import UsageError
from launcher.runs.run_dir import RunDir
from launcher.system.files import write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

Json = dict[str, Any]


def look(file: str) -> None:
    """Refuse a place where no page can be written, before anything is read."""
    if Path(file).suffix not in (".html", ".htm"):
        raise UsageError(
            f"--html {file}: not the name of a page; put --html behind the runs, or write --html FILE.html"
        )
    if not Path(file).parent.is_dir():
        raise UsageError(f"--html {file}: there is no folder {Path(file).parent}; make it, or name a file elsewhere")


def write(
    file: str,
    rows: Sequence[Json],
    columns: Sequence[tuple[str, bool, Sequence[str]]],
    *,
    keys: Sequence[str],
    metric: str,
    marks: Sequence[str],
    notes: Sequence[str],
) -> None:
    """Write the page, and say where it is.

    Args:
        file: where to.
        rows: of :mod:`launcher.commands.compare`, the best first.
        columns: of the table, the runs' names first: heading, whether it has numbers, cells.
        keys: in which the recipes differ.
        metric: that is compared.
        marks: not empty for the best runs.
        notes: what is to be said below the table.
    """
    from launcher.report import comparison, parallel

    names = [row["run"] for row in rows]
    axes = [
        *((key, [row["recipe"].get(key) for row in rows]) for key in keys),
        (metric, [row["best"]["value"] if row["best"] else None for row in rows]),
    ]
    page = comparison.render(
        title=f"{len(rows)} runs by {metric}",
        columns=columns,
        links=[_link(RunDir(name), Path(file)) for name in names],
        picture=parallel.draw(names, axes, [bool(mark) for mark in marks]),
        notes=notes,
    )
    try:
        write_text_atomic(Path(file), page)
    except OSError as error:
        raise UsageError(f"--html {file}: cannot be written: {error.strerror}") from None
    print(f"{file}: {len(rows)} runs, the best first; it needs no other file")


def _link(run: RunDir, page: Path) -> str | None:
    """Where a run's report is, as seen from the page."""
    if not run.report_html.is_file():
        return None
    return quote(os.path.relpath(run.report_html, page.absolute().parent))
