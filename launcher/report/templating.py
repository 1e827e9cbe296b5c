"""Fills in the templates of the page and the card; Jinja2 escapes every text where a template writes it.

Jinja2 is imported here, so import this module only where a report is written.
"""

from __future__ import annotations

import functools
import json
import re
import time
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from launcher.images import pixels
from launcher.images.folder import printable
from launcher.recipe.user_code import as_in_run
from launcher.system import cpu as host_cpu
from launcher.system.words import plural

if TYPE_CHECKING:
    from collections.abc import Callable


def page(template: str, **values: Any) -> str:
    """A template filled in as HTML."""
    return _environment().get_template(template).render(values)


def card(template: str, **values: Any) -> str:
    """A template filled in as Markdown: all that Markdown, its tables and HTML in it would act on is escaped."""
    return _environment(finalize=markdown).get_template(template).render(values)


@functools.cache
def _environment(finalize: Callable[[Any], Any] | None = None) -> Environment:
    """Keeps its compiled templates.

    Args:
        finalize: what is done to the value of every expression before it is written.
    """
    made = Environment(
        loader=PackageLoader("launcher.report"),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= FILTERS
    return made


def markdown(value: Any) -> Markup:
    """Text that Markdown shows as it is, on one line."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", re.sub(r"\s+", " ", str(value)))
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))  # noqa: S704  escaped here


def code(value: Any) -> Markup:
    """Text between a Markdown template's backticks; nothing else ends it."""
    return Markup(" ".join(str(value).splitlines()).replace("`", "'"))  # noqa: S704  code is shown as it is


def fence(text: str) -> Markup:
    """Backticks that enclose a block of code, more than the code has in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return Markup("`" * max(3, longest + 1))  # noqa: S704  nothing but backticks


def number(value: float | None, template: str) -> str:
    """A number by its format string; "-" where it is not known."""
    return "-" if value is None else template.format(value)


def metric(value: float | None, shown_as: dict[str, Any] | None) -> str:
    """A metric that is a fraction in percent, any other as it is; ``shown_as`` is its row of the report's metrics."""
    return number(value, "{:.2%}" if shown_as and shown_as["fraction"] else "{:.4f}")


def duration(seconds: float | None) -> str:
    """Seconds in readable units; "-" where they are not known."""
    if seconds is None:
        return "-"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes else f"{seconds:.1f} s"


def moment(seconds: float | None) -> str:
    """Seconds since 1970 as date and time; "-" where they are not known."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def setting(value: Any) -> str:
    """A recipe's value: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


FILTERS = {
    "code": code,
    "describe_preprocessing": pixels.describe,
    "duration": duration,
    "in_run": as_in_run,
    "metric": metric,
    "moment": moment,
    "number": number,
    "only_for_cpus": host_cpu.only_for,
    "plural": plural,
    "printable": printable,
    "setting": setting,
}
