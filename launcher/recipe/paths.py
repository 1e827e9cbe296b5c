"""Makes the paths of a recipe absolute, because a run may be resumed from another working directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe


def absolute(recipe: Recipe) -> Recipe:
    """The same recipe with absolute paths; relative ones start at this working directory."""
    model, data, launch, post = recipe.model, recipe.data, recipe.launch, recipe.post
    if model.weights_file is not None:
        model = replace(model, weights=str(model.weights_file.absolute()))
    if data.path is not None:
        data = replace(data, path=_absolute(data.path))
    if data.classes is not None:
        data = replace(data, classes=_absolute(data.classes))
    if launch.profile is not None:
        launch = replace(launch, profile=_profile(launch.profile))
    if post.profile is not None:
        post = replace(post, profile=_profile(post.profile))
    return replace(recipe, model=model, data=data, launch=launch, post=post)


def is_profile_path(name: str) -> bool:
    """Whether a cluster's profile is given as a path, not by its name."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _profile(name: str) -> str:
    return _absolute(name) if is_profile_path(name) else name
