"""``launch recipes``: the recipes that come with this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.commands import parser_of
from launcher.errors import EXIT_OK
from launcher.start import RECIPES

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``launch recipes``; return its exit code."""
    parser_of("recipes", "List the recipes that come with this package.").parse_args(argv)
    for path in sorted(RECIPES.rglob("*.yaml")):
        comments = [
            line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"
        ]
        about = next((line for line in comments if line and not line.startswith("yaml-language-server")), "")
        print(f"{path.stem:<22} {about}")
    return EXIT_OK
