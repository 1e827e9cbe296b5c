"""What no single value of a recipe shows: fields that contradict each other, names and files that are not there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from launcher.errors import Problem, UsageError, did_you_mean
from launcher.images import columns, datasets
from launcher.images import listing as listings
from launcher.images.listing import Listing
from launcher.recipe import catalog, run_weights, user_code
from launcher.recipe import images as recipe_images
from launcher.recipe import metrics as recipe_metrics

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from launcher.recipe.schema import Recipe
    from launcher.recipe.schema_data import DataConfig
    from launcher.recipe.schema_model import ModelConfig
    from launcher.recipe.source import Source


Finding = tuple[tuple[str, ...], str]
"""The keys it follows from, first the one to blame, and what is wrong."""


def find_problems(recipe: Recipe, source: Source, refused: Collection[str] = ()) -> list[Problem]:
    """Everything that is wrong with a recipe whose single values are right. Reads folders, imports no torch.

    Args:
        recipe: with defaults in the place of values that were refused.
        source: where the values came from.
        refused: keys whose values were: what follows from their defaults would only confuse.
    """
    findings = [
        found
        for group in (_training, _phases, _task, _placement, _model, _augmentation, _cache, _data)
        for found in group(recipe)
    ]
    findings += user_code.find_problems(recipe, source)
    return [
        Problem(key=keys[0], where=source.where(keys[0]), message=text)
        for keys, text in findings
        if not any(f"{key}.".startswith(f"{r}.") or r.startswith(f"{key}.") for key in keys for r in refused)
    ]


def _phases(recipe: Recipe) -> Iterator[Finding]:
    """Phases that contradict each other or other keys."""
    named, key = recipe.train.phases, "train.phases"
    for other in ("freeze", "unfreeze"):
        if named and getattr(recipe.model, other):
            text = f"{key} says what learns when; give freeze in each phase, or leave {key} out"
            yield (f"model.{other}", key), text
    for number, one in enumerate(named[:-1]):
        if one.epochs is None:
            text = "missing: how many epochs it has; only the last phase may leave that out"
            yield (f"{key}.{number}.epochs", key), text
    lengths = [one.epochs for one in named]
    total = sum(length or 0 for length in lengths)
    if named and None not in lengths and total < recipe.train.epochs:
        found = f"found {recipe.train.epochs}, but the phases are {total} epochs long"
        yield ("train.epochs", key), f"{found}; make the last one longer, or leave out its epochs: it has the rest then"


def _training(recipe: Recipe) -> Iterator[Finding]:
    stop, batch = recipe.train.early_stopping, recipe.batch
    valid = recipe_metrics.watchable(recipe.metrics)
    better = valid.get(stop.metric)
    metric, mode = "train.early_stopping.metric", "train.early_stopping.mode"
    if better is None:
        hint = recipe_metrics.nearest(stop.metric, valid)
        yield (
            (metric, "metrics"),
            " ".join(filter(None, [f"found {stop.metric!r}; no such metric;", hint, f"valid: {', '.join(valid)}"])),
        )
    elif better != stop.mode:
        yield (mode, metric), f"found {stop.mode!r}, which would keep the worst {stop.metric}; valid: {better}"
    yield from (((key,), text) for key, text in recipe_metrics.find_problems(recipe.metrics))
    if batch.global_size is not None and batch.accumulate != 1:
        yield (
            ("batch.accumulate", "batch.global_size"),
            "follows from global_size, size and the number of ranks; give global_size or accumulate, not both",
        )
    if recipe.train.clip_grad_norm is not None and recipe.train.clip_grad_value is not None:
        keys = ("train.clip_grad_value", "train.clip_grad_norm")
        yield keys, "the gradient is clipped by its norm already; give clip_grad_norm or clip_grad_value, not both"
    if recipe.train.ema is not None and recipe.train.swa is not None:
        yield ("train.swa", "train.ema"), "the weights are averaged already, by ema; give swa or ema, not both"
    if recipe.post.quantize and "onnx" not in recipe.post.export:
        names = ", ".join(recipe.post.quantize)
        yield ("post.quantize", "post.export"), f"{names}: made from the onnx export; add onnx to post.export"


def _task(recipe: Recipe) -> Iterator[Finding]:
    """What goes with several classes an image."""
    data, train = recipe.data, recipe.train
    if data.task != "multi_label":
        return
    if train.loss in ("cross_entropy", "focal"):
        text = f"found {train.loss}, which chooses one class an image; with data.task: multi_label use "
        yield ("train.loss", "data.task"), f"{text}binary_cross_entropy, or a loss of your own that takes N x C targets"
    if not data.dataset and data.name != "imagefolder":
        text = f"{data.name} gives an image one class; with multi_label name a list as data.path, or your data.dataset"
        yield ("data.task", "data.name"), text
    if data.balance == "sampler":
        text = "found sampler; images of several classes cannot be dealt to one of them: use weights or none"
        yield ("data.balance", "data.task"), text


def _placement(recipe: Recipe) -> Iterator[Finding]:
    launch = recipe.launch
    if launch.gpus != "auto" and launch.device == "cpu":
        yield (
            ("launch.device", "launch.gpus"),
            f"cpu, but {launch.gpus} GPUs per node are asked for; use --procs for workers on the CPU",
        )
    if launch.gpus != "auto" and launch.procs not in ("auto", launch.gpus):
        yield (
            ("launch.procs", "launch.gpus"),
            f"found {launch.procs}, but there is one worker per GPU and launch.gpus is {launch.gpus}; leave one out",
        )
    fewest, _, most = str(launch.nodes).rpartition(":")
    if fewest and int(fewest) > int(most):
        yield ("launch.nodes",), f"found {launch.nodes}; valid: MIN:MAX where MIN is not more than MAX, as in 2:4"
    elif launch.spares and launch.max_nodes == 1:
        text = "a spare machine takes the place of one of several: give launch.nodes (--nodes) 2 or more, or 1:2"
        yield ("launch.spares", "launch.nodes"), text
    one = ("auto", 1)
    if launch.backend == "local" and (launch.max_nodes != 1 or launch.procs not in one or launch.gpus not in one):
        keys = ("launch.backend", "launch.nodes", "launch.procs", "launch.gpus")
        yield keys, "local is one process on this machine; use torchrun for more"


def _model(recipe: Recipe) -> Iterator[Finding]:
    model = recipe.model
    if model.unfreeze and not model.freeze:
        keys = ("model.unfreeze", "model.freeze")
        yield keys, "nothing is frozen; name the layers in model.freeze first"
    if model.weights_file is not None:
        yield from _weights_file(model.weights_file)
    if not model.factory:
        yield from _architecture(model)
    elif model.weights not in (None, "DEFAULT") and model.weights_file is None:
        keys = ("model.weights", "model.factory")
        yield keys, f"{model.weights} are torchvision's; with model.factory: a file, or null for what it returns"


def _architecture(model: ModelConfig) -> Iterator[Finding]:
    """A model of torchvision's, and its weights by name."""
    if isinstance(model.head, list):
        keys, kinds = ("model.head", "model.factory"), "auto, linear, mlp(256) or dropout(0.2)"
        yield keys, f"names of layers go with model.factory; of torchvision's models the head is known: give {kinds}"
    try:
        entry = catalog.find_model(model.arch)
    except UsageError as error:
        yield ("model.arch",), str(error)
        return
    if model.weights is not None and model.weights_file is None:
        keys = ("model.weights", "model.arch")
        try:
            weights = entry.find_weights(model.weights)
        except UsageError as error:
            yield keys, str(error)
        else:
            if weights.top1 is None:
                yield keys, f"{model.weights} is no whole model (torchvision gives it no accuracy); use DEFAULT"


def _weights_file(file: Path) -> Iterator[Finding]:
    if run_weights.is_run(file):
        yield ("model.weights",), f"{file}: this run has no best checkpoint yet: the first validation makes one"
    elif file.is_dir():
        inside = ", ".join(sorted(each.name for each in file.iterdir() if each.is_file())[:8]) or "none"
        yield ("model.weights",), f"{file}: is a folder; name the file with the weights (files in it: {inside})"
    elif not file.is_file():
        yield ("model.weights",), f"{file}: no such file; a name such as DEFAULT is torchvision's, null is none"


def _cache(recipe: Recipe) -> Iterator[Finding]:
    own = [f"data.{key}" for key in ("dataset", "transform") if getattr(recipe.data, key)]
    if own and recipe.data.cache != "none":
        text = f"found {recipe.data.cache}; what {' and '.join(own)} make of an image is not kept: leave data.cache out"
        yield ("data.cache", *own), text


def _augmentation(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.data
    if data.crop_scale != "auto" and data.crop_scale[0] > data.crop_scale[1]:
        yield ("data.crop_scale",), f"found {data.crop_scale}; the first, the least, must not be more than the second"
    if (data.mixup or data.cutmix) and recipe.batch.size == 1:
        keys = ("batch.size", "data.mixup" if data.mixup else "data.cutmix")
        yield keys, f"found 1; {keys[1]} mixes the images of a batch in pairs: give 2 or more"
    views, mixing = recipe.train.feature_views, next((key for key in ("mixup", "cutmix") if getattr(data, key)), None)
    if mixing and views not in ("auto", 0):
        text = f"found {views}; data.{mixing} mixes images anew in every step, so that no view is kept: give auto or 0"
        yield ("train.feature_views", f"data.{mixing}"), text


def _data(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.data
    if data.transform and data.channels == 1:
        text = "found 1; what data.transform makes of an image is used as it is: have it do this, and leave the key out"
        yield ("data.channels", "data.transform"), text
    for name in ("mean", "std"):
        found = getattr(data, name)
        if found != "auto" and len(found) != data.channels:
            text = f"found {len(found)} value{'s' if len(found) > 1 else ''}; with data.channels: {data.channels} give "
            yield (f"data.{name}", "data.channels"), f"{text}{data.channels}"
    if data.grey_limits and data.grey_limits[0] >= data.grey_limits[1]:
        yield ("data.grey_range",), f"found {data.grey_range}; the first, which is black, must be less than the second"
    if data.dataset:
        return
    yield from _layout_keys(data)
    row = datasets.DATASETS[data.name]
    if row.write and data.path is not None:
        text = f"{data.name} are not read from a folder; for the images in {data.path} add data.name=imagefolder"
        yield ("data.path", "data.name"), text
        return
    keys, is_written = ("data.path", "data.name"), datasets.is_written(data.name, data.path)
    if is_written and (problem := datasets.find_problem(data.name, data.path)):
        yield ("data.name",) if row.is_written else keys, problem
        return
    if not is_written and data.path is None:
        what = "the folder that holds train/ and val/, or a list (.csv, .jsonl, .parquet)"
        yield keys, f"missing: {what}; give it here or as data.path=/my/photos"
    elif not is_written:  # else when it is written: engine.recipe_checks
        yield from find_image_problems(recipe)


def find_image_problems(recipe: Recipe) -> Iterator[Finding]:
    """Why the images that a recipe names, which are there, cannot be trained on."""
    source = recipe_images.source_of(recipe)
    problems = listings.find_problems(
        source,
        missing_val_classes=recipe.data.missing_val_classes,
        need_files=recipe.data.on_bad_image == "error",
    )
    for text in problems:
        said = None if text.startswith(f"{source.label}: ") else re.match(r"data\.(\w+): ", text)
        said = said if said and said[1] in type(recipe.data).__dataclass_fields__ else None  # of another key
        yield (f"data.{said[1]}",) if said else ("data.path", "data.name"), text[said.end() :] if said else text
    if not problems and recipe.model.num_classes != "auto":
        listing = Listing(source)
        found, kind = len(listing.classes), "classes" if source.classes else "class folders"
        if found > recipe.model.num_classes:
            keys = ("model.num_classes", "data.path")
            where = source.classes or listing.trained.place
            yield keys, f"found {recipe.model.num_classes}, but {where} has {found} {kind}"


def _layout_keys(data: DataConfig) -> Iterator[Finding]:
    """Keys that say how images are laid out."""
    unknown = sorted(set(data.columns) - set(columns.COLUMNS))
    if unknown:
        valid = f"valid: {', '.join(columns.COLUMNS)}"
        hint = " ".join(filter(None, [did_you_mean(unknown[0], columns.COLUMNS), valid]))
        yield ("data.columns",), f"found {unknown[0]!r}; no such column of a list; {hint}"
    if data.separator is not None and data.task != "multi_label":
        text = "goes with data.task: multi_label, where a row of a list names several classes"
        yield ("data.separator", "data.task"), text
    if data.group is not None and data.val_fraction is None:
        text = "goes with data.val_fraction: it keeps what belongs together on one side where images are divided"
        yield ("data.group", "data.val_fraction"), text
