"""``launch schema``: the JSON Schema of a recipe, for editors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``launch schema``; return its exit code."""
    parser_of("schema", "Print the JSON Schema of a recipe.").parse_args(argv)
    from launcher.recipe import load as recipes

    print(json.dumps(recipes.json_schema(), indent=2))
    return EXIT_OK
