"""Any torchvision classification model with a head for this data set's classes, its weights, and what of it learns."""

from __future__ import annotations

import contextlib
import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision import models

from launcher.engine.data import Preprocessing
from launcher.engine.layers import batch_norms, head_modules, keep_inputs, match_parameters
from launcher.engine.loading.samples import seed_generators
from launcher.engine.network.fitting import AUXILIARY, load_weights, take_grey, torchvision_weights
from launcher.engine.network.shape import is_shaped, shape
from launcher.engine.user import model as user_model
from launcher.engine.user.model import IMAGENET_MEAN, IMAGENET_STD, InputFacts
from launcher.errors import UsageError
from launcher.recipe import phases
from launcher.recipe.user_code import as_in_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from launcher.recipe.phases import Freezing
    from launcher.recipe.schema import Recipe
    from launcher.recipe.schema_data import DataConfig
    from launcher.recipe.schema_model import ModelConfig

AUXILIARY_WEIGHT = {"googlenet": 0.3, "inception_v3": 0.4}  # of each auxiliary loss, as their papers have it


def build_preprocessing(model: ModelConfig, data: DataConfig, *, num_classes: int | None = None) -> Preprocessing:
    """Sizes of the recipe; mean, deviation and interpolation of the weights that training starts from.

    Args:
        model: the recipe's.
        data: the recipe's.
        num_classes: with a model of the user's own, which is asked; None: nobody asks, it is not to be computed with.
    """
    if not model.factory:
        facts = _torchvision_facts(model)
    else:
        facts = user_model.facts(model, num_classes=num_classes) if num_classes else InputFacts()
    size = facts.image_size if data.image_size == "auto" else data.image_size
    means: tuple[float, ...] = facts.mean
    deviations: tuple[float, ...] = facts.std
    if data.channels == 1:
        # Pretrained ones of these scale colours to 0.5 and 0.5 themselves, which they cannot do with grey.
        scales = not model.factory and model.arch in AUXILIARY and model.weights is not None
        means, deviations = (((0.5,) if scales else (statistics.fmean(of),)) for of in (means, deviations))
    return Preprocessing(
        image_size=size,
        resize_size=round(size / data.crop_pct),
        mean=means if data.mean == "auto" else tuple(data.mean),
        std=deviations if data.std == "auto" else tuple(data.std),
        interpolation=facts.interpolation if data.interpolation == "auto" else data.interpolation,
        background=data.background_rgb,
        grey_range=data.grey_limits,
        channels=data.channels,
        own_transform=data.transform and as_in_run(data.transform),
        decode=data.decode,
    )


def _torchvision_facts(model: ModelConfig) -> InputFacts:
    trained_with, from_imagenet = torchvision_weights(model).transforms(), model.weights is not None
    return InputFacts(
        image_size=trained_with.crop_size[0],
        mean=tuple(trained_with.mean) if from_imagenet else IMAGENET_MEAN,
        std=tuple(trained_with.std) if from_imagenet else IMAGENET_STD,
        interpolation=trained_with.interpolation.value,
    )


def build_module(config: ModelConfig, *, num_classes: int, image_size: int, channels: int = 3) -> nn.Module:
    """The network with new weights from torch's generator; logits N x num_classes from float32 N x C x S x S.

    Raises:
        UsageError: it cannot be made to take so many channels.
    """
    module = _architecture(config, num_classes=num_classes, image_size=image_size)
    if is_shaped(config):
        of_user = user_model.head_of(module, config, num_classes=num_classes) if config.factory else None
        shape(module, config, of_user or head_modules(config.arch))
    if channels == 1:
        take_grey(module, config)
    return module


def head_of(module: nn.Module, config: ModelConfig, *, num_classes: int) -> tuple[str, ...]:
    """Dotted names of the layers, of a module that :func:`build_module` made, that are new for new classes."""
    if not config.factory:
        return head_modules(config.arch)
    found = user_model.head_of(module, config, num_classes=num_classes)
    is_inside = str(config.head).startswith("mlp")  # the last layer was found, of several that are new
    return tuple(name.rpartition(".")[0] for name in found) if is_inside else found


def _architecture(config: ModelConfig, *, num_classes: int, image_size: int) -> nn.Module:
    if config.factory:
        return user_model.build(config, num_classes=num_classes)
    options: dict[str, Any] = {}
    if config.arch in AUXILIARY:
        options = {"aux_logits": True, "init_weights": config.weights is None}
    elif config.arch.startswith("vit_"):
        options = {"image_size": image_size}
    elif config.arch.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    module = models.get_model(config.arch, weights=None, num_classes=num_classes, **options)
    keep_inputs(module)
    if config.arch in AUXILIARY:
        module.transform_input = config.weights is not None  # type: ignore[assignment]  # pretrained ones saw inputs scaled in another way
    return module


class FineTunedModel:
    """A network, where its head is, and what of it is frozen in an epoch.

    Args:
        module: the network.
        config: the recipe's ``model``.
        head: dotted names of its layers that are new for a new number of classes; None: as the architecture has it.
        freezings: what learns from which epoch on (the recipe's phases); None: as ``config`` says.
    """

    def __init__(
        self,
        module: nn.Module,
        config: ModelConfig,
        head: Sequence[str] | None = None,
        freezings: Sequence[Freezing] | None = None,
    ) -> None:
        self.module = module
        self.head = head_modules(config.arch) if head is None else tuple(head)
        self._freezings = freezings or phases.freezings(config)
        self._frozen_by_factory = frozenset(name for name, p in module.named_parameters() if not p.requires_grad)

    def matching(self, patterns: Iterable[str]) -> set[str]:
        """Names of the parameters that any of the patterns selects.

        Raises:
            UsageError: one selects nothing.
        """
        return match_parameters(self.module, patterns, self.head)

    def freeze(self, epoch: int) -> bool:
        """Freeze what is frozen in ``epoch``; return whether that changed anything."""
        frozen = self.frozen_parameters(epoch)
        changed = False
        for name, parameter in self.module.named_parameters():
            wanted = name not in frozen
            changed |= parameter.requires_grad != wanted
            parameter.requires_grad_(wanted)
            if not wanted:
                parameter.grad = None
        return changed

    def frozen_parameters(self, epoch: int) -> set[str]:
        """Names of the parameters that do not learn in ``epoch``."""
        now = phases.at(self._freezings, epoch)
        return (self.matching(now.freeze) | self._frozen_by_factory) - self.matching(now.learn)

    def hungriest_epoch(self) -> int:
        """An epoch whose steps take the most memory: the backward pass reaches the lowest layer, the most learns.

        What an activation takes grows with the batch, and is kept from the lowest layer on that learns.
        """
        parameters = dict(self.module.named_parameters())

        def hunger(start: int) -> tuple[int, int]:
            frozen = self.frozen_parameters(start)
            depth = next((place for place, name in enumerate(parameters) if name not in frozen), len(parameters))
            return -depth, sum(parameter.numel() for name, parameter in parameters.items() if name not in frozen)

        return max((one.start for one in self._freezings), key=hunger)

    def train(self) -> None:
        """Training mode, but for modules that are frozen as a whole: their BatchNorm statistics must not move."""
        self.module.train()
        for module in self.module.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()

    @contextlib.contextmanager
    def fixed_statistics(self) -> Iterator[None]:
        """BatchNorm as in evaluation: one image has no variance to divide by, and none has nothing to learn from."""
        layers = [layer for layer in batch_norms(self.module) if layer.training]
        for layer in layers:
            layer.eval()
        try:
            yield
        finally:
            for layer in layers:
                layer.train()

    def eval(self) -> None:
        """Evaluation mode, all of it."""
        self.module.eval()


def split_outputs(arch: str, outputs: Any) -> tuple[torch.Tensor, list[tuple[float, torch.Tensor]]]:
    """The logits, and those of auxiliary heads with the weight of their loss (googlenet, inception_v3 in training)."""
    if isinstance(outputs, torch.Tensor):
        return outputs, []
    if arch not in AUXILIARY_WEIGHT:
        raise UsageError(f"the model returned {type(outputs).__name__}; it must return a tensor of N x C logits")
    weight = AUXILIARY_WEIGHT[arch]
    return outputs.logits, [(weight, o) for name, o in outputs._asdict().items() if name != "logits" and o is not None]


def build_model(
    recipe: Recipe, *, num_classes: int, image_size: int, with_weights: bool, classes: Sequence[str] | None = None
) -> FineTunedModel:
    """The model of a recipe on the host.

    Args:
        recipe: names it.
        num_classes: outputs.
        image_size: pixels.
        with_weights: read the starting weights; only rank 0 needs to, DDP hands them on.
        classes: in the order of the outputs; the head of an earlier run is kept where it was for the very same.
    """
    torch.manual_seed(recipe.seed)
    seed_generators(recipe.seed)
    channels = recipe.data.channels
    module = build_module(recipe.model, num_classes=num_classes, image_size=image_size, channels=channels)
    head = head_of(module, recipe.model, num_classes=num_classes)
    if with_weights:
        load_weights(module, recipe.model, image_size=image_size, head=head, classes=classes)
    return FineTunedModel(module, recipe.model, head, phases.phases(recipe))
