"""The weights that training starts from: whether the model takes them, whose they are if not, what is not taken."""

from __future__ import annotations

import math
import urllib.error
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from launcher.engine.layers import build_meta, head_modules
from launcher.engine.network.fitting import (
    are_gone,
    check_finite,
    fit_weights,
    is_for_others,
    listed,
    torchvision_weights,
)
from launcher.engine.network.timm_names import MAPPED
from launcher.engine.weights_file import fit, present_name, read_states, read_weights_file
from launcher.errors import UsageError
from launcher.recipe import catalog

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from launcher.engine.weights_file import Weights
    from launcher.recipe.schema import Recipe
    from launcher.recipe.schema_model import ModelConfig

    State = dict[str, torch.Tensor]

SIZED = "encoder.pos_embedding"
"""Whose shape follows from the size of the images."""
OTHERS = "; its names are timm's, of a variant that torchvision has not"


def find_problems(
    recipe: Recipe, module: nn.Module, size: int, *, is_new: bool, head: Sequence[str], classes: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """The key, and why the weights that a recipe starts from cannot be taken; says what of them is not taken.

    torchvision's that its cache lacks are downloaded.

    Args:
        recipe: names them.
        module: its model; its values do not matter.
        size: of the images, in pixels.
        is_new: whether training begins from the weights.
        head: names of the layers that are new for new classes.
        classes: in the order of the outputs.
    """
    config = recipe.model
    if config.weights is None or (not is_new and are_gone(config)):
        return
    if config.weights_file is None:
        yield from _download(recipe)
        return
    wanted = module.state_dict()
    try:
        found = read_weights_file(config.weights_file, wanted, device="meta")
        try:
            taken = fit_weights(found.state, module, config, image_size=size, head=head, classes=classes)
        except UsageError as error:
            raise UsageError(_whose(config, found, wanted) or f"{error}{OTHERS if found.is_timms else ''}") from error
        values = read_weights_file(config.weights_file, wanted).state
        check_finite({name: values[name] for name in taken}, config)
    except UsageError as error:
        yield "model.weights", str(error)
    else:
        if is_new:
            _tell_of_weights(config, found, wanted, size, [name for name in wanted if name not in taken], classes)


def _tell_of_weights(
    config: ModelConfig,
    found: Weights,
    wanted: State,
    size: int,
    not_taken: Sequence[str],
    classes: Sequence[str],
) -> None:
    """What is not taken as it is in the file; all that is would be no news."""
    if found.also:
        place = found.place or "the file itself"
        print(f"{config.weights}: the weights are those in {place}; {', '.join(found.also)} would fit too", flush=True)
    if found.is_timms:
        differs = f"; {found.differs}" if found.differs else ""
        print(f"{config.weights}: timm's names are read as torchvision's{differs}", flush=True)
    if not config.factory and config.arch.startswith("vit_") and SIZED in found.state:
        before = math.isqrt(found.state[SIZED].shape[1] - 1)
        after = size // wanted["conv_proj.weight"].shape[-1]
        sizes = f"from {before} x {before} patches of an image to {after} x {after}"
        if before != after:
            print(f"{config.weights}: position embeddings are interpolated {sizes}", flush=True)
    new = [name for name in not_taken if not name.endswith("num_batches_tracked")]
    if new:
        there = next((found.state[name].shape[0] for name in new if name in found.state), None)
        why = "it has none" if there is None else f"its own is for {there} classes"
        if there is not None and is_for_others(config, classes):
            why = "its own is for other classes, or in another order"
        print(f"{config.weights}: a new head is put on for {len(classes)} classes ({listed(new)}): {why}", flush=True)


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


# --- whose they are


def _whose(config: ModelConfig, found: Weights, wanted: State) -> str | None:
    """What there is to say of weights that do not fit; None: which of them do not says it best."""
    begin = f"{config.weights} does not fit {config.label}"
    if not config.factory and config.weights_file:
        other = _architecture_of(config.weights_file)
        if other and other != config.arch:
            return f"{begin}: it has the weights of {other}; give model.arch={other}, or another file"
    if found.state.keys().isdisjoint(wanted):
        first, known = next(iter(found.state)), f"torchvision's names and timm's of {MAPPED}"
        return f"{begin}: none of its {len(found.state)} names ({first}, …) is one of that model's; known are {known}"
    return None


def _architecture_of(file: Path) -> str | None:
    """The torchvision model that all weights of a file fit, but for its head; None: there is none.

    Takes some seconds: every model is built, without values.

    Raises:
        UsageError: the file cannot be read.
    """
    states = read_states(file, device="meta")
    for arch in catalog.classification_models():
        wanted = build_meta(arch, 2).state_dict()
        if _fits({present_name(key): value for key, value in fit(states, wanted).state.items()}, wanted, arch):
            return arch
    return None


def _fits(state: State, wanted: State, arch: str) -> bool:
    head = tuple(f"{name}." for name in head_modules(arch))
    found, needed = (
        {
            key: None if key == SIZED else value.shape
            for key, value in of.items()
            if not key.startswith(head) and not key.endswith("num_batches_tracked")
        }
        for of in (state, wanted)
    )
    return found == needed
