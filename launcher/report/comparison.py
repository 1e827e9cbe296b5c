"""Runs side by side as one HTML file that needs no other: parallel coordinates, and the table of `launch compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.report import parallel, templating

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.report.parallel import Parallel


def render(
    *,
    title: str,
    columns: Sequence[tuple[str, bool, Sequence[str]]],
    links: Sequence[str | None],
    picture: Parallel | None,
    notes: Sequence[str],
) -> str:
    """The page.

    Args:
        title: what is compared.
        columns: of the table: heading, whether it has numbers, and the cells, the best run first; the first column has
            the runs' names.
        links: of each run the address of its report, or None.
        picture: of :func:`launcher.report.parallel.draw`.
        notes: what is to be said of the table.
    """
    return templating.page(
        "comparison.html.jinja",
        title=title,
        columns=columns,
        links=links,
        picture=picture,
        notes=notes,
        cut=parallel.cut,
    )
