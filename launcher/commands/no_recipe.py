"""What to write where the first word of a command line is neither a recipe nor a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from launcher import start
from launcher.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def refuse(word: str, following: Sequence[str], commands: Iterable[str]) -> None:
    """Refuse a word that names no recipe; a path is left to those who read it.

    Args:
        word: what stands where the recipe should.
        following: the arguments after it that are not options.
        commands: the subcommands that there are.

    Raises:
        UsageError: it is neither a recipe nor a path.
    """
    is_path = "/" in word or (Path(word).suffix and "=" not in word)
    if is_path or Path(start.find_recipe(word)).exists():
        return
    recipes = [path.stem for path in start.recipes()]
    if "=" in word:
        what = f"is an override; the recipe comes first: launch RECIPE {word}"
    elif following and (Path(following[0]).suffix == ".yaml" or Path(start.find_recipe(following[0])).exists()):
        what = f"is not a command; write: launch {' '.join(following)}"
    elif _is_model(word):
        what = f"is a model, not a recipe; write: launch RECIPE model.arch={word}; `launch recipes` lists the recipes"
    else:
        near = did_you_mean(word, [*recipes, *commands])
        lists = "`launch recipes` lists the recipes, `launch --help` the commands"
        what = " ".join(filter(None, ["is neither a recipe nor a command;", near, lists]))
    raise UsageError(f"{word} {what}")


def _is_model(word: str) -> bool:
    from launcher.recipe import catalog

    return word in catalog.classification_models()
