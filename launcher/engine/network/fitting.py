"""Makes weights fit a network: another head, another size of images, grey images, other names."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from launcher.engine.layers import head_modules
from launcher.engine.non_finite import non_finite_names
from launcher.engine.weights_file import present_name, read_weights_file
from launcher.errors import UsageError
from launcher.recipe import run_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.recipe.schema_model import ModelConfig
    from launcher.runs.run_dir import RunDir

COLOURS = 3
AUXILIARY = ("googlenet", "inception_v3")
AUXILIARY_CLASSIFIERS = ("AuxLogits.", "aux1.", "aux2.")


def torchvision_weights(config: ModelConfig) -> Any:
    """The member of torchvision's weights enumeration that ``model.weights`` names; for a file or null, DEFAULT."""
    name = "DEFAULT" if config.weights is None or config.weights_file else config.weights
    return models.get_model_weights(config.arch)[name]


def are_gone(config: ModelConfig) -> bool:
    """Whether the weights that training started from are not there any more: a file, or torchvision's in its cache."""
    if config.weights_file is not None:
        return not config.weights_file.is_file()
    if config.weights is None or config.factory:
        return False
    return not (Path(torch.hub.get_dir()) / "checkpoints" / Path(torchvision_weights(config).url).name).is_file()


def are_needed(config: ModelConfig, run: RunDir) -> bool:
    """Whether a run needs the weights that it starts from: a checkpoint has its own, also where those are gone."""
    return not (are_gone(config) and run.newest_state())


def load_weights(
    module: nn.Module,
    config: ModelConfig,
    *,
    image_size: int,
    head: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Give ``module`` the weights the recipe names; a head for other classes keeps its new ones.

    Raises:
        UsageError: the file does not fit the model, and says which keys; or it holds NaN or infinite values.
    """
    if config.weights is None or (config.factory and config.weights_file is None):
        return
    if config.weights_file is not None:
        state = read_weights_file(config.weights_file, module.state_dict()).state
    else:
        options = {"aux_logits": True} if config.arch in AUXILIARY else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision warns of its own arguments
            source = models.get_model(config.arch, weights=torchvision_weights(config), progress=False, **options)
        state = source.state_dict()
    state = fit_weights(state, module, config, image_size=image_size, head=head, classes=classes)
    check_finite(state, config)
    load_state(module, state, strict=False)


def check_finite(state: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """From NaN or infinite weights nothing is learned; training would seem to diverge.

    What has no values, a buffer of a model on the meta device, is passed over.

    Raises:
        UsageError: there are such values; names the tensors.
    """
    names = non_finite_names({name: value for name, value in state.items() if not value.is_meta})
    if names:
        raise UsageError(
            f"{config.weights}: NaN or infinite values in {listed(names)}: the training that made it has diverged, or "
            "the file is damaged; take an earlier one"
        )


def load_state(module: nn.Module, state: dict[str, torch.Tensor], *, strict: bool = True) -> None:
    """Load a state dict that has lost its version numbers in a file; MNASNet refuses one without."""
    versioned = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]  # noqa: SLF001  torch's own place
    module.load_state_dict(versioned, strict=strict)


def fit_weights(
    state: dict[str, torch.Tensor],
    module: nn.Module,
    config: ModelConfig,
    *,
    image_size: int,
    head: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Those entries of ``state`` that ``module`` takes: all but a head of another shape, or for other classes.

    Args:
        state: by the names that the model has.
        module: the model.
        config: the recipe's.
        image_size: pixels.
        head: dotted names of the layers that are new for new classes; None: as the architecture has it.
        classes: in the order of the outputs, which an earlier run's must be for its head to be kept.

    Raises:
        UsageError: anything but the head is missing, left over or of another shape.
    """
    expected = module.state_dict()
    state = {present_name(k): v for k, v in state.items()}
    head = tuple(f"{name}." for name in (head_modules(config.arch) if head is None else head))
    if not config.factory and config.arch in AUXILIARY:  # whose classifiers beside the head others leave out
        head += tuple(name for name in AUXILIARY_CLASSIFIERS if not any(key.startswith(name) for key in state))
    if is_for_others(config, classes):
        state = {k: v for k, v in state.items() if not k.startswith(head)}
    state = _fit_first_convolution(state, module)
    if not config.factory and config.arch.startswith("vit_") and "encoder.pos_embedding" in state:
        state = _resize_positions(state, expected, image_size)
    fitting = {k: v for k, v in state.items() if k in expected and v.shape == expected[k].shape}
    missing = [
        k for k in expected if k not in state and not k.startswith(head) and not k.endswith("num_batches_tracked")
    ]
    foreign = [k for k in state if k not in expected and not k.startswith(head)]
    reshaped = [
        f"{k} ({'x'.join(map(str, state[k].shape))}, needs {'x'.join(map(str, expected[k].shape))})"
        for k in expected
        if k in state and k not in fitting and not k.startswith(head)
    ]
    problems = [
        f"{len(keys)} {what}: {listed(keys)}"
        for what, keys in (("keys missing", missing), ("keys unknown", foreign), ("of another shape", reshaped))
        if keys
    ]
    if problems:
        raise UsageError(f"{config.weights} does not fit {config.label}: {'; '.join(problems)}")
    return fitting


def is_for_others(config: ModelConfig, classes: Sequence[str] | None) -> bool:
    """Whether the weights are of a run of one's own that was trained for other classes, or in another order."""
    file = config.weights_file
    of_run = run_weights.classes_of(file) if file and classes is not None else None
    return of_run is not None and of_run != list(classes or ())


def _fit_first_convolution(state: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """Add up the three colours of the first convolution where the model takes grey images.

    What it gives for a grey image is what it gave for the same image in colour.
    """
    name, first = _first_convolution(module)
    key = f"{name}.weight"
    if first is None or key not in state or state[key].dim() != first.weight.dim():
        return state
    is_grey, is_colour = first.weight.shape[1] == 1, state[key].shape[1] == COLOURS
    return {**state, key: state[key].sum(1, keepdim=True)} if is_grey and is_colour else state


def take_grey(module: nn.Module, config: ModelConfig) -> None:
    """Have a model take images of one channel: in its first convolution the weights of the three colours are added up.

    Raises:
        UsageError: it has no such convolution.
    """
    name, first = _first_convolution(module)
    if first is not None and first.in_channels == 1:
        return
    if first is None or first.in_channels != COLOURS or first.groups != 1:
        found = "it has none" if first is None else f"{name} takes {first.in_channels}"
        raise UsageError(
            f"found 1, but the first convolution of {config.label} has no three channels to add up ({found}); have "
            "your model take one channel, or give 3"
        )
    learns, first.in_channels = first.weight.requires_grad, 1
    first.weight = nn.Parameter(first.weight.detach().sum(1, keepdim=True), requires_grad=learns)
    if hasattr(module, "transform_input"):  # which scales each colour anew
        module.transform_input = False  # type: ignore[assignment]  # a plain attribute


def grey_problems(module: nn.Module, config: ModelConfig, channels: int) -> Iterator[tuple[str, str]]:
    """The key, and why a model cannot take grey images where it is to; else it takes them from here on."""
    if channels == 1:
        try:
            take_grey(module, config)
        except UsageError as error:
            yield "data.channels", str(error)


def _first_convolution(module: nn.Module) -> tuple[str, nn.Conv2d | None]:
    found = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d))
    return next(found, ("", None))


def listed(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join([*names[:4], *(["…"] if len(names) > 4 else [])])  # noqa: PLR2004


def _resize_positions(
    state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], image_size: int
) -> dict[str, torch.Tensor]:
    """Interpolate a vision transformer's position embeddings to another image size, as torchvision does.

    Those of a variant (without a class token, with one more) are left as they are, to be told as of another shape.
    """
    name = "encoder.pos_embedding"
    places = state[name].shape[1] - 1 if state[name].dim() == expected[name].dim() else 0
    if state[name].shape == expected[name].shape or not places or math.isqrt(places) ** 2 != places:
        return state
    patch = expected["conv_proj.weight"].shape[-1]
    if state[name].device.type == "meta":
        return {**state, name: expected[name]}
    resized: dict[str, torch.Tensor] = interpolate_embeddings(image_size, patch, OrderedDict(state))
    return resized
