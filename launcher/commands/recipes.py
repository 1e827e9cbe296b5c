"""``launch recipes``: the recipes that come with this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher import start
from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``launch recipes``; return its exit code."""
    parser = parser_of("recipes", "List the recipes that come with this package, or print one.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this one: launch recipes NAME > mine.yaml")
    name = parser.parse_args(argv).name
    known = {path.stem: path for path in start.recipes()}
    if name is None:
        for stem, path in known.items():
            print(f"{stem:<22} {_about(path.read_text(encoding='utf-8'))}\n{'':<22} {path}")
        print(
            "\nlaunch NAME runs one, launch new mine --from NAME copies it to mine.yaml, launch recipes NAME prints it"
        )
    elif name in known:
        print(f"# {known[name]}\n{known[name].read_text(encoding='utf-8')}", end="")
    else:
        near = did_you_mean(name, known)
        raise UsageError(" ".join(filter(None, [f"{name}: no such recipe;", near, f"valid: {', '.join(known)}"])))
    return EXIT_OK


def _about(text: str) -> str:
    """What a recipe is for: its first comment."""
    comments = [line.removeprefix("#").strip() for line in text.splitlines() if line[:1] == "#"]
    return next((line for line in comments if line and not line.startswith("yaml-language-server")), "")
