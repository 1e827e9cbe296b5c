"""A recipe of nothing but what a command line gives, for commands that take some of its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.recipe.schema import Recipe


def recipe_of(overrides: Sequence[str]) -> Recipe:
    """The defaults, with these ``key=value``.

    Raises:
        RecipeError: one of them is wrong.
    """
    from pydantic import ValidationError

    from launcher.recipe import load as recipes
    from launcher.recipe import schema_errors
    from launcher.recipe import source as recipe_source
    from launcher.recipe.schema import Recipe

    source = recipe_source.from_values("command line", {}, overrides, schema=Recipe)
    try:
        recipe = recipes.from_dict(source.values)
        problems = list(source.problems)
    except ValidationError as error:
        problems = [*source.problems, *schema_errors.explain(error, source, Recipe)]
    if problems:
        raise RecipeError(problems, of="overrides")
    return recipe
