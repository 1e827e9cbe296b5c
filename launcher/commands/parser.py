"""The parsers of the command line, whose refusals say what to write instead."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING, NoReturn

from launcher.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

UNKNOWN = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """Refuses in a line or two: what was wrong, and what to write."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UsageError: always.
        """
        more = f"`{self.prog} --help` lists what there is"
        if message.startswith(UNKNOWN):
            unknown = message.removeprefix(UNKNOWN)
            message = f"{unknown}: {self._instead(unknown.split())}"
        message = message.replace("required: RECIPE, key=value", "required: RECIPE, as in `launch quickstart`")
        message = message.replace(", key=value", "")  # argparse names it too, though none need be given
        raise UsageError(f"{message}\n  {more}")

    def _instead(self, unknown: list[str]) -> str:
        """What to write for arguments that this parser does not know."""
        if not unknown[0].startswith("-"):
            return "no such argument"
        keys = list(_keys(unknown)) if any(action.dest == "overrides" for action in self._actions) else []
        if keys:
            return f"no such option; keys of the recipe go without dashes: {' '.join(keys)}"
        options = [option for action in self._actions for option in action.option_strings]
        return " ".join(filter(None, ["no such option;", did_you_mean(unknown[0], options)])).rstrip(";")


def _keys(unknown: list[str]) -> Iterator[str]:
    """What to write for the options that a recipe has keys for."""
    from launcher.recipe import other_names
    from launcher.recipe.schema import Recipe

    for typed, following in itertools.zip_longest(unknown, unknown[1:], fillvalue="-"):
        flag, _, value = typed.partition("=")
        name = flag.lstrip("-")
        if flag.startswith("-") and (keys := other_names.keys_of(name, Recipe)):
            yield f"{' or '.join(keys)}={value or ('VALUE' if following.startswith('-') else following)}"


def parser_of(verb: str, description: str) -> Parser:
    """A parser for the arguments of ``launch VERB``."""
    return Parser(prog=f"launch {verb}", description=description, allow_abbrev=False)
