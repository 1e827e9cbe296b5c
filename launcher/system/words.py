"""Numbers in a sentence."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """How many there are: "1 node", "1,200 nodes", "3 classes"."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"
