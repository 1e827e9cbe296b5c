"""From overrides with several values to the runs of a sweep: every combination, each with a name of its own."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_RUNS = 1000
MAX_LABEL = 60


def expand(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """All combinations of ``key=a,b,c`` overrides, the last one changing fastest; commas in brackets or quotes stay.

    Raises:
        UsageError: there is nothing to combine, or too much.
    """
    choices = []
    for item in overrides:
        key, equals, value = item.partition("=")
        choices.append([f"{key}{equals}{part}" for part in split(value)])
    if all(len(values) == 1 for values in choices):
        raise UsageError("--sweep: give at least one key several values, as in optim.lr=0.1,0.01")
    runs = list(itertools.islice(itertools.product(*choices), MAX_RUNS + 1))
    if len(runs) > MAX_RUNS:
        raise UsageError(f"--sweep: more than {MAX_RUNS} combinations; give fewer values")
    return runs


def split(value: str) -> list[str]:
    """Cut at the commas that are in no bracket and no quotes."""
    parts, depth, quote = [""], 0, ""
    for char in value:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def labels(runs: Sequence[Sequence[str]]) -> list[str]:
    """A folder name for each run: its number and what is its own, as in ``01-optim.lr=0.1``."""
    shared = set.intersection(*(set(run) for run in runs)) if runs else set()
    width = len(str(len(runs) - 1))
    return [
        f"{number:0{width}}-{re.sub(r'[^A-Za-z0-9._=+-]+', '_', '-'.join(i for i in run if i not in shared))}"[
            :MAX_LABEL
        ]
        for number, run in enumerate(runs)
    ]
