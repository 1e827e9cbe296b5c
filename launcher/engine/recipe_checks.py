"""What only torch can tell about a recipe before anything is written or started. Runs in the launch process."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torchvision

from launcher.engine import data, state
from launcher.engine.layers import batch_norms, build_meta, head_modules, on_meta
from launcher.engine.loading.data_sets import full_classes, num_classes
from launcher.engine.model import (
    FineTunedModel,
    build_module,
    build_preprocessing,
    head_of,
)
from launcher.engine.network import shape, starting_weights, sync_batchnorm
from launcher.engine.network.fitting import (
    grey_problems,
)
from launcher.engine.optimizing import groups, muon
from launcher.engine.user import checks as user_checks
from launcher.engine.user import model as user_model
from launcher.engine.user import trial
from launcher.errors import Problem, RecipeError, UsageError
from launcher.images import datasets
from launcher.images import folder as image_folder
from launcher.recipe import metrics as recipe_metrics
from launcher.recipe import phases
from launcher.recipe.checks import find_image_problems
from launcher.recipe.images import listing_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from launcher.recipe.schema import Recipe
    from launcher.recipe.schema_model import ModelConfig
    from launcher.runs.run_dir import RunDir
    from launcher.runs.user_code import Code


def check(
    recipe: Recipe,
    where: Callable[[str], str],
    *,
    is_new: bool = True,
    code: Code | None = None,
    place: Path | None = None,
) -> None:
    """Check that the model can be built, takes the weights, and that every pattern selects something.

    Torchvision weights that the cache lacks are downloaded, and the digits are written: once, before workers need them.

    Args:
        recipe: checked by recipe.load already.
        where: from a key to the place in the recipe's file.
        is_new: whether training begins from the weights, so that what is not taken of them is worth a line; a run that
            has begun is told what only a new one is refused for.
        code: of the user's, which is tried in a child process.
        place: the run directory, for messages about that code.

    Raises:
        RecipeError: names everything that is wrong.
        trial.UserCodeError: the user's code raised.
    """
    find = functools.partial(_find, is_new=is_new)
    found = trial.find_problems(recipe, code, find, place=place or Path()) if code else _in_one_thread(find, recipe)
    problems = [Problem(key=key, where=where(key), message=text) for key, text in found]
    if problems:
        raise RecipeError(problems)


def _in_one_thread(find: Callable[[Recipe], Iterator[tuple[str, str]]], recipe: Recipe) -> list[tuple[str, str]]:
    """This process forks the exports later, and where OpenMP has begun more threads its child would wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return list(find(recipe))
    finally:
        torch.set_num_threads(before)


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
    if recipe.data.dataset:  # rank 0 compares them when it has made the data set
        return
    listed = replace(recipe, data=replace(recipe.data, transform=None))  # whose images nobody looks at
    train_set = data.open_split(listed, "train", build_preprocessing(recipe.model, recipe.data))
    try:
        state.check_train_set(run, train_set, saved)
    except UsageError as error:
        raise RecipeError([Problem(key="data.path", where=where("data.path"), message=str(error))]) from None


def _find(recipe: Recipe, *, is_new: bool) -> Iterator[tuple[str, str]]:
    try:
        if not recipe.data.dataset and datasets.is_written(recipe.data.name, recipe.data.path):
            datasets.prepare(recipe.data.name, recipe.data.path)  # only now is it there to be looked at
            found = [(keys[0], text) for keys, text in find_image_problems(recipe)]
            yield from found
            if found:
                return
        names = data.find_classes(recipe)
    except UsageError as error:
        yield "data.dataset" if recipe.data.dataset else "data.name", str(error)
        return
    classes = num_classes(recipe, names)
    if len(names) > classes:
        yield "model.num_classes", f"found {classes}, but data.dataset has {len(names)} classes"
    elif recipe.data.task == "multi_label" and len(names) != classes:
        yield (
            "model.num_classes",
            f"found {classes}; with data.task=multi_label auto, or the {len(names)} that there are",
        )
    watched = recipe.train.early_stopping.metric
    if watched.removeprefix("val/") in recipe_metrics.trivial(classes):
        text = f"found {watched!r}, which is the same for every model with {classes} classes; use val/top1"
        yield "train.early_stopping.metric", text
    weighed = not recipe.data.dataset and listing_of(recipe).weights("train") is not None
    yield from user_checks.find(recipe, classes, weighed=weighed)
    if recipe.data.dataset or recipe.data.transform:
        yield from _samples(recipe, classes)
    if recipe.model.factory:
        yield from _own_model(recipe, names, is_new=is_new)
        return
    size, head = build_preprocessing(recipe.model, recipe.data).image_size, head_modules(recipe.model.arch)
    module = build_meta(recipe.model.arch, classes)
    refused = [*shape.problems(module, recipe.model, head), *grey_problems(module, recipe.model, recipe.data.channels)]
    yield from [*refused, *_batchnorm(recipe, module)]
    yield from _patterns(recipe, FineTunedModel(module, recipe.model, head, phases.phases(recipe)), is_new=is_new)
    if not refused:
        yield from _image_size(recipe, classes, size)
    trained = full_classes(recipe, names)
    yield from starting_weights.find_problems(recipe, module, size, is_new=is_new, head=head, classes=trained)


def _batchnorm(recipe: Recipe, module: nn.Module) -> Iterator[tuple[str, str]]:
    if not recipe.model.sync_batchnorm:
        return
    key = "model.sync_batchnorm"
    if not batch_norms(module):
        yield key, f"found true, but {recipe.model.label} has no BatchNorm; leave it out"
    elif names := sync_batchnorm.others(module):
        kind = type(module.get_submodule(names[0])).__name__
        text = f"found true, but {image_folder.few(names)} of {recipe.model.label} is no plain BatchNorm (a {kind})"
        yield (
            key,
            f"{text}, and what its class adds would be lost; leave it out, or take nn.BatchNorm1d, 2d or 3d there",
        )


def _samples(recipe: Recipe, classes: int) -> Iterator[tuple[str, str]]:
    """The first sample of each split, as training and as validation see it."""
    key = "data.dataset" if recipe.data.dataset else "data.transform"
    try:
        preprocessing = build_preprocessing(recipe.model, recipe.data, num_classes=classes)
    except UsageError:
        return  # of the model, which is looked at next
    try:
        train = data.open_split(recipe, "train", preprocessing, is_train=True)
        others = ["val", *([recipe.data.test] if recipe.data.dataset and recipe.data.test else [])]
        opened = [data.open_split(recipe, split, preprocessing, classes=train.classes) for split in others]
        key = "data.transform" if recipe.data.transform else key
        for samples in (train, *opened):
            if len(samples):
                samples[0, 0]
    except UsageError as error:
        yield key, str(error)


def _own_model(recipe: Recipe, names: list[str], *, is_new: bool) -> Iterator[tuple[str, str]]:
    """The user's own model, made as training makes it."""
    config, classes = recipe.model, num_classes(recipe, names)
    try:
        module = user_model.build(config, num_classes=classes)
    except UsageError as error:
        yield "model.factory", str(error)
        return
    try:
        head = user_model.head_of(module, config, num_classes=classes)
    except UsageError as error:
        yield "model.head", str(error)
        return
    if refused := list(shape.problems(module, config, head)):
        yield from refused
        return
    yield from _batchnorm(recipe, module)
    head = head_of(module, config, num_classes=classes)
    size = user_model.facts_of(module).image_size if recipe.data.image_size == "auto" else recipe.data.image_size
    yield from grey_problems(module, recipe.model, recipe.data.channels)
    try:
        user_model.try_forward(module, config, num_classes=classes, image_size=size, channels=recipe.data.channels)
    except UsageError as error:
        yield "model.factory", str(error)
    yield from _patterns(recipe, FineTunedModel(module, config, head, phases.phases(recipe)), is_new=is_new)
    if config.weights_file is not None:
        trained = full_classes(recipe, names)
        yield from starting_weights.find_problems(recipe, module, size, is_new=is_new, head=head, classes=trained)


def _patterns(recipe: Recipe, model: FineTunedModel, *, is_new: bool) -> Iterator[tuple[str, str]]:
    bad = False
    for key, names in _named_layers(recipe):
        for name in names:
            try:
                model.matching([name])
            except UsageError as error:
                bad = True
                yield key, str(error)
    if not bad:
        useless = list(groups.problems(recipe, model))
        if not is_new:  # an earlier version may have begun the run, and let them pass
            for key, text in useless:
                print(f"{key}: {text}", flush=True)
        yield from (*(useless if is_new else ()), *muon.problems(recipe, model))
        every = {name for name, _ in model.module.named_parameters()}
        begun = phases.phases(recipe)
        idle = next((number for number, one in enumerate(begun) if model.frozen_parameters(one.start) == every), None)
        if idle is not None:
            key = f"train.phases.{idle}.freeze" if recipe.train.phases else "model.freeze"
            yield key, f"freezes all of {recipe.model.label} in epoch {begun[idle].start + 1}; leave something to learn"


def _named_layers(recipe: Recipe) -> Iterator[tuple[str, list[str]]]:
    """The keys that name layers by pattern, and the patterns."""
    yield "model.freeze", recipe.model.freeze
    for epoch, names in recipe.model.unfreeze.items():
        yield f"model.unfreeze.{epoch}", [names] if isinstance(names, str) else names
    for name in recipe.optim.groups:
        yield f"optim.groups.{name}", [name]
    for number, one in enumerate(recipe.train.phases):
        yield f"train.phases.{number}.freeze", one.freeze
        for name in one.optim.groups or {}:
            yield f"train.phases.{number}.optim.groups.{name}", [name]


def _image_size(recipe: Recipe, classes: int, size: int) -> Iterator[tuple[str, str]]:
    """A forward pass on the meta device meets every complaint about shapes.

    It takes no memory, but a second to import what it needs: so what was accepted once is remembered.
    """
    known = _accepted_size(recipe.model, classes, size) if recipe.data.channels > 1 else None
    if known and known.exists():
        return
    try:
        with torch.random.fork_rng(devices=[]), on_meta():
            module = build_module(recipe.model, num_classes=classes, image_size=size, channels=recipe.data.channels)
        module.to("meta").train()(torch.empty(2, recipe.data.channels, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        yield "data.image_size", f"{recipe.model.arch} does not take images of {size} px: {str(error).splitlines()[0]}"
        return
    if known:
        with contextlib.suppress(OSError):
            known.parent.mkdir(parents=True, exist_ok=True)
            known.touch()


def _accepted_size(config: ModelConfig, classes: int, size: int) -> Path | None:
    """The file that is there if the model takes images of that size; None: there is no place for one."""
    start = "new" if config.weights is None else "pretrained"
    versions = f"torch-{torch.__version__}-torchvision-{torchvision.__version__}"
    try:
        folder = image_folder.cache_dir() / "image-sizes"
    except UsageError:
        return None
    return folder / f"{config.arch}-{start}-{classes}-classes-{size}-px-{versions}"
