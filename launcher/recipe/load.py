"""Reads a recipe and names everything that is wrong with it at once.

pydantic checks the values against the schema and collects all errors; OmegaConf reads YAML, resolves interpolations
and applies the overrides of the command line.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from launcher.errors import RecipeError
from launcher.recipe import user_code
from launcher.recipe.schema import Recipe
from launcher.recipe.types import describe, validate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.recipe.source import Source


EARLIER = {("data", "decode"): "exact"}
"""What a run did whose recipe was written before there was a key, where that is not the key's default."""
QUICK_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's, where PyYAML was built with it: each worker reads the run's recipe three times, 1 instead of 7 ms each."""
RENAMED = {("post", "quantize"): {"onnx_int8": "int8"}}
"""Values in lists of a recorded recipe that have another name now."""


def load(
    path: str,
    overrides: Sequence[str] = (),
    flags: dict[str, tuple[str, Any]] | None = None,
    *,
    has_begun: bool = False,
) -> tuple[Recipe, Source]:
    """Read the recipe at ``path`` and check it; precedence is defaults < file < overrides < flags.

    Args:
        path: a YAML file.
        overrides: OmegaConf dotlist items, ``optim.lr=0.1``.
        flags: dotted key to (the flag as typed, its value), as in ``{"launch.nodes": ("--nodes", 2)}``.
        has_begun: a checkpoint is gone on with, so that the starting weights are not needed any more.

    Returns:
        The recipe, and where each of its values came from.

    Raises:
        RecipeError: names every problem, each with its key and the line or flag it came from.
    """
    from launcher.recipe import checks as recipe_checks
    from launcher.recipe import schema_errors
    from launcher.recipe import source as recipe_source

    source = recipe_source.read(path, [*_earlier(path), *overrides], flags or {}, schema=Recipe)
    _take_epochs_of_phases(source.values)
    problems = list(source.problems)
    try:
        recipe = from_dict(source.values)
    except ValidationError as error:
        problems += schema_errors.explain(error, source, Recipe)
        recipe = from_dict(recipe_source.without(source.values, [p.key for p in problems]))
    problems += recipe_checks.find_problems(recipe, source, refused=[p.key for p in problems if p.key])
    if has_begun:
        problems = [problem for problem in problems if problem.key != "model.weights" or not _is_gone(recipe)]
    if problems:
        raise RecipeError(problems)
    return recipe, source


def _is_gone(recipe: Recipe) -> bool:
    """Whether a file, or a run, that training started from is not there any more."""
    return recipe.model.weights_file is not None and not recipe.model.weights_file.is_file()


def _take_epochs_of_phases(values: dict[str, Any]) -> None:
    """Make ``train.epochs`` what the phases take together, where it is not given and each says how long it is."""
    train = values.get("train")
    if not isinstance(train, dict) or "epochs" in train or not isinstance(named := train.get("phases"), list):
        return
    lengths = [one.get("epochs") for one in named if isinstance(one, dict)]
    known = [length for length in lengths if type(length) is int]
    if known and len(known) == len(named):
        train["epochs"] = sum(known)


def from_dict(values: dict[str, Any]) -> Recipe:
    """Make a recipe of nested plain values.

    Raises:
        pydantic.ValidationError: lists all values that do not fit the schema.
    """
    return validate(Recipe, values)


def from_recorded(values: dict[str, Any]) -> Recipe:
    """Make a recipe of what a run has recorded, perhaps by an earlier version."""
    changed = _lacking(values)
    for section, found in _renamed(values).items():
        changed.setdefault(section, {}).update(found)
    return from_dict({name: {**values[name], **changed[name]} if name in changed else values[name] for name in values})


def _renamed(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a recorded recipe calls by a name of RENAMED, section by section."""
    found: dict[str, dict[str, Any]] = {}
    for (section, key), names in RENAMED.items():
        value = values.get(section, {}).get(key)
        if isinstance(value, list) and names.keys() & {*value}:
            found.setdefault(section, {})[key] = [names.get(each, each) for each in value]
    return found


def _lacking(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of EARLIER what is not in a recorded recipe, section by section."""
    found: dict[str, dict[str, Any]] = {}
    for (section, key), value in EARLIER.items():
        if key not in values.get(section, {}):
            found.setdefault(section, {})[key] = value
    return found


def _earlier(path: str) -> list[str]:
    """Overrides for the recipe of a run, in its run directory; none for any other file."""
    file = Path(path)
    if not (file.parent / "plan.json").is_file():
        return []
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        changed = [*_lacking(values).items(), *_renamed(values).items()]
        return [f"{section}.{key}={value}" for section, found in changed for key, value in found.items()]
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError):  # which is told when it is read
        return []


def read_resolved(path: Path) -> Recipe:
    """Read the ``recipe.yaml`` of a run directory, which was checked when it was written.

    References to the user's code lead to the run's copies, wherever the run directory is now.
    """
    loader = QUICK_LOADER(path.read_text(encoding="utf-8"))
    try:
        recipe = from_recorded(loader.get_single_data())
    finally:
        loader.dispose()
    return user_code.placed(recipe, path.absolute().parent)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """All fields as plain values, in the order of the schema."""
    return asdict(recipe)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    from omegaconf import OmegaConf

    # OmegaConf's own writer: it puts text in quotes that its reader, but not PyYAML's, would take for a number (1e3).
    return str(OmegaConf.to_yaml(OmegaConf.create(to_dict(recipe))))


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe file, for editors."""
    schema = describe(Recipe)
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **schema, "title": "finetune-launcher recipe"}
