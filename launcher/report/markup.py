"""Texts, numbers, times and tables as HTML: the pieces that the report's page is made of."""

from __future__ import annotations

import html
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Cell = tuple[str, str]
"""HTML, and a CSS class or an empty string."""


def escape(value: Any) -> str:
    """Text as HTML shows it, in an attribute too."""
    return html.escape(str(value))


def show_number(value: float | None, template: str) -> str:
    """A number by its format string, or a dash where it is not known."""
    return "-" if value is None else template.format(value)


def metric(value: float | None, *, fraction: bool) -> str:
    """A metric that is a fraction in percent, any other as it is."""
    return show_number(value, "{:.2%}" if fraction else "{:.4f}")


def duration(seconds: float | None) -> str:
    """Seconds in units that are readable, or a dash."""
    if seconds is None:
        return "-"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes else f"{seconds:.1f} s"


def moment(seconds: float | None) -> str:
    """Seconds since 1970 as date and time, or a dash."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def section(title: str, content: str) -> str:
    """A part of the page under its heading; nothing where it has no content."""
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def num(value: float | None, template: str) -> Cell:
    """A table's cell with a number, or a dash where it is not known."""
    return show_number(value, template), "num"


def html_table(caption: str, head: Sequence[Cell], rows: Iterable[Sequence[Cell]], css: str = "") -> str:
    """A table that scrolls by itself, by keyboard too; the first cell of a row is its header. A cell's text is HTML."""

    def cell(tag: str, content: Cell, scope: str = "") -> str:
        return f"<{tag}{scope}{css_class(content[1])}>{content[0]}</{tag}>"

    body = "\n".join(
        "<tr>" + cell("th", row[0], ' scope="row"') + "".join(cell("td", item) for item in row[1:]) + "</tr>"
        for row in rows
    )
    top = "".join(cell("th", item, ' scope="col"') for item in head)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">\n<table{css_class(css)}>'
        f"<caption>{caption}</caption>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n</div>"
    )


def css_class(name: str) -> str:
    """The attribute of that name, where there is one."""
    return f' class="{name}"' if name else ""
