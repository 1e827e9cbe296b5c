"""What only torch can tell about a recipe before anything is written or started. Runs in the launch process."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from launcher.engine import data, state
from launcher.engine.layers import build_meta, head_modules, on_meta
from launcher.engine.model import (
    FineTunedModel,
    build_module,
    build_preprocessing,
    check_finite,
    fit_weights,
    torchvision_weights,
)
from launcher.engine.setup import num_classes
from launcher.engine.user import checks as user_checks
from launcher.engine.weights_file import read_weights_file
from launcher.errors import Problem, RecipeError, UsageError
from launcher.images import folder as image_folder
from launcher.recipe import metrics as recipe_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from launcher.engine.weights_file import Weights
    from launcher.recipe.schema import ModelConfig, Recipe
    from launcher.runs.run_dir import RunDir
    from launcher.runs.user_code import Code


def check(recipe: Recipe, where: Callable[[str], str], code: Code, *, is_new: bool = True) -> None:
    """Check that the model can be built, takes the weights, and that every pattern selects something.

    Torchvision weights that the cache lacks are downloaded, and the digits are written: once, before workers need them.

    Args:
        recipe: checked by recipe.load already.
        where: from a key to the place in the recipe's file.
        code: of the user's own, which the recipe names.
        is_new: whether training begins from the weights, so that what is not taken of them is worth a line.

    Raises:
        RecipeError: names everything that is wrong.
    """
    with code.staged(recipe) as tried:
        found = list(_find(tried, is_new=is_new))
    problems = [Problem(key=key, where=where(key), message=text) for key, text in found]
    if problems:
        raise RecipeError(problems)


def check_train_set(run: RunDir, recipe: Recipe, where: Callable[[str], str]) -> None:
    """Check that a run that has a checkpoint would go on with the training images that it began with.

    Args:
        run: there may be none yet.
        recipe: to go on with.
        where: from a key to the place in the recipe's file.

    Raises:
        RecipeError: they are others.
    """
    saved = run.newest_state()
    if saved is None:
        return
    transform = build_preprocessing(recipe.model, recipe.data).transform()
    train_set = data.ImageDataset(data.prepare(recipe.data), "train", transform, seed=recipe.seed)
    try:
        state.check_train_set(run, train_set, saved)
    except UsageError as error:
        raise RecipeError([Problem(key="data.path", where=where("data.path"), message=str(error))]) from None


def _find(recipe: Recipe, *, is_new: bool) -> Iterator[tuple[str, str]]:
    folder = data.prepare(recipe.data)
    classes = num_classes(recipe, image_folder.find_classes(folder / "train"))
    preprocessing = build_preprocessing(recipe.model, recipe.data)
    watched = recipe.train.early_stopping.metric
    if watched.removeprefix("val/") in recipe_metrics.trivial(classes):
        text = f"found {watched!r}, which is the same for every model with {classes} classes; use val/top1"
        yield "train.early_stopping.metric", text
    yield from user_checks.find(recipe, classes)
    if recipe.model.factory:
        return
    yield from _patterns(recipe, classes)
    yield from _image_size(recipe, classes, preprocessing.image_size)
    yield from _weights(recipe, classes, preprocessing.image_size, is_new=is_new)


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


def _weights(recipe: Recipe, classes: int, size: int, *, is_new: bool) -> Iterator[tuple[str, str]]:
    config = recipe.model
    if config.weights is None:
        return
    if config.weights_file is None:
        yield from _download(recipe)
        return
    module = build_meta(config.arch, classes)
    wanted = module.state_dict()
    try:
        found = read_weights_file(config.weights_file, wanted, device="meta")
        taken = fit_weights(found.state, module, config, image_size=size)
        values = read_weights_file(config.weights_file, wanted).state
        check_finite({name: values[name] for name in taken}, config)
    except UsageError as error:
        yield "model.weights", str(error)
    else:
        if is_new:
            _tell_of_weights(config, found, wanted, classes)


def _tell_of_weights(config: ModelConfig, found: Weights, wanted: dict[str, torch.Tensor], classes: int) -> None:
    """What is not taken as it is in the file; all that is would be no news."""
    if found.also:
        place = found.place or "the file itself"
        print(f"{config.weights}: the weights are those in {place}; {', '.join(found.also)} would fit too", flush=True)
    head = [name for part in head_modules(config.arch) for name in wanted if name.startswith(f"{part}.")]
    new = [name for name in head if name not in found.state or found.state[name].shape != wanted[name].shape]
    if new:
        there = next((found.state[name].shape[0] for name in new if name in found.state), None)
        why = "it has none" if there is None else f"its own is for {there} classes"
        print(f"{config.weights}: a new head is put on for {classes} classes ({', '.join(new)}): {why}", flush=True)


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
