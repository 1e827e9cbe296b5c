"""What only torch can tell about a recipe before anything is written or started. Runs in the launch process."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from launcher import image_folder
from launcher.engine import data
from launcher.engine.layers import build_meta, on_meta
from launcher.engine.model import (
    FineTunedModel,
    build_module,
    build_preprocessing,
    fit_weights,
    read_weights_file,
    torchvision_weights,
)
from launcher.engine.setup import num_classes
from launcher.errors import Problem, RecipeError, UsageError
from launcher.recipe import TOP_K

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from launcher.recipe import Recipe


def check(recipe: Recipe, where: Callable[[str], str]) -> None:
    """Check that the model can be built, takes the weights, and that every pattern selects something.

    Torchvision weights that the cache lacks are downloaded, and the digits are written: once, before workers need them.

    Args:
        recipe: checked by recipe.load already.
        where: from a key to the place in the recipe's file.

    Raises:
        RecipeError: names everything that is wrong.
    """
    problems = [Problem(key=key, where=where(key), message=text) for key, text in _find(recipe)]
    if problems:
        raise RecipeError(problems)


def _find(recipe: Recipe) -> Iterator[tuple[str, str]]:
    folder = data.prepare(recipe.data)
    classes = num_classes(recipe, image_folder.find_classes(folder / "train"))
    preprocessing = build_preprocessing(recipe.model, recipe.data)
    if recipe.train.early_stopping.metric == "val/top5" and classes <= TOP_K:
        yield "train.early_stopping.metric", f"found 'val/top5', which is always 1 with {classes} classes; use val/top1"
    yield from _patterns(recipe, classes)
    yield from _image_size(recipe, classes, preprocessing.image_size)
    yield from _weights(recipe, classes, preprocessing.image_size)


def _patterns(recipe: Recipe, classes: int) -> Iterator[tuple[str, str]]:
    model = FineTunedModel(build_meta(recipe.model.arch, classes), recipe.model)
    thaw = {
        f"model.unfreeze.{epoch}": [names] if isinstance(names, str) else names
        for epoch, names in recipe.model.unfreeze.items()
    }
    patterns = {"model.freeze": recipe.model.freeze, **thaw}
    patterns |= {f"optim.groups.{name}": [name] for name in recipe.optim.groups}
    bad = False
    for key, names in patterns.items():
        for name in names:
            try:
                model.matching([name])
            except UsageError as error:
                bad = True
                yield key, str(error)
    if not bad:
        every = {name for name, _ in model.module.named_parameters()}
        epochs = range(recipe.train.epochs)
        idle = next((epoch for epoch in epochs if model.frozen_parameters(epoch) == every), None)
        if idle is not None:
            yield "model.freeze", f"freezes all of {recipe.model.arch} in epoch {idle}; leave something to learn"


def _image_size(recipe: Recipe, classes: int, size: int) -> Iterator[tuple[str, str]]:
    """A forward pass on the meta device costs nothing and meets every complaint about shapes."""
    try:
        with torch.random.fork_rng(devices=[]), on_meta():
            module = build_module(recipe.model, num_classes=classes, image_size=size)
        module.to("meta").train()(torch.empty(2, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        yield "data.image_size", f"{recipe.model.arch} does not take images of {size} px: {str(error).splitlines()[0]}"


def _weights(recipe: Recipe, classes: int, size: int) -> Iterator[tuple[str, str]]:
    config = recipe.model
    if config.weights is None:
        return
    if config.weights_file is None:
        yield from _download(recipe)
        return
    try:
        state = read_weights_file(config.weights_file, device="meta")
        fit_weights(state, build_meta(config.arch, classes), config, image_size=size)
    except UsageError as error:
        yield "model.weights", str(error)


def _download(recipe: Recipe) -> Iterator[tuple[str, str]]:
    weights = torchvision_weights(recipe.model)
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if file.is_file():
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        prefix = file.stem.rpartition("-")[2]
        print(f"downloading {weights.url} to {file}", flush=True)
        torch.hub.download_url_to_file(weights.url, str(file), hash_prefix=prefix, progress=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        advice = (
            f"put {weights.url} at {file} (TORCH_HOME moves that folder), name a local file, or null for random ones"
        )
        found = f"the weights {recipe.model.weights} are not in torch's cache and cannot be downloaded ({error})"
        yield "model.weights", f"{found}: {advice}"
