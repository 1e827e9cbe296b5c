"""Any torchvision classification model with a head for this data set's classes, its weights, and what of it learns."""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from launcher.engine.data import Preprocessing
from launcher.engine.layers import batch_norms, head_modules, keep_inputs, match_parameters
from launcher.engine.loading.samples import seed_generators
from launcher.engine.non_finite import non_finite_names
from launcher.engine.user import model as user_model
from launcher.engine.user.model import IMAGENET_MEAN, IMAGENET_STD, InputFacts
from launcher.engine.weights_file import present_name, read_weights_file
from launcher.errors import UsageError
from launcher.recipe.user_code import as_in_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from launcher.recipe.schema import ModelConfig, Recipe
    from launcher.recipe.schema_data import DataConfig

AUXILIARY = ("googlenet", "inception_v3")
AUXILIARY_WEIGHT = {"googlenet": 0.3, "inception_v3": 0.4}  # of each auxiliary loss, as their papers have it


def torchvision_weights(config: ModelConfig) -> Any:
    """The member of torchvision's weights enumeration that ``model.weights`` names; for a file or null, DEFAULT."""
    name = "DEFAULT" if config.weights is None or config.weights_file else config.weights
    return models.get_model_weights(config.arch)[name]


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
    return Preprocessing(
        image_size=size,
        resize_size=round(size / data.crop_pct),
        mean=facts.mean if data.mean == "auto" else (data.mean[0], data.mean[1], data.mean[2]),
        std=facts.std if data.std == "auto" else (data.std[0], data.std[1], data.std[2]),
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


def build_module(config: ModelConfig, *, num_classes: int, image_size: int) -> nn.Module:
    """The network with new weights from torch's generator; logits N x num_classes from float32 N x 3 x S x S."""
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


def load_weights(module: nn.Module, config: ModelConfig, *, image_size: int, head: Sequence[str] | None = None) -> None:
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
    state = fit_weights(state, module, config, image_size=image_size, head=head)
    check_finite(state, config)
    load_state(module, state, strict=False)


def check_finite(state: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """From NaN or infinite weights nothing is learned; training would seem to diverge.

    Raises:
        UsageError: there are such values; names the tensors.
    """
    names = non_finite_names(state)
    if names:
        raise UsageError(
            f"{config.weights}: NaN or infinite values in {_listed(names)}: the training that made it has diverged, or "
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
) -> dict[str, torch.Tensor]:
    """Those entries of ``state`` that ``module`` takes: all but a head of another shape.

    Raises:
        UsageError: anything but the head is missing, left over or of another shape.
    """
    expected = module.state_dict()
    state = {present_name(k): v for k, v in state.items()}
    head = tuple(f"{name}." for name in (head_modules(config.arch) if head is None else head))
    if not config.factory and config.arch.startswith("vit_") and "encoder.pos_embedding" in state:
        state = _resize_positions(state, expected, image_size)
    fitting = {k: v for k, v in state.items() if k in expected and v.shape == expected[k].shape}
    missing = [
        k for k in expected if k not in state and not k.startswith(head) and not k.endswith("num_batches_tracked")
    ]
    foreign = [k for k in state if k not in expected]
    reshaped = [
        f"{k} ({'x'.join(map(str, state[k].shape))}, needs {'x'.join(map(str, expected[k].shape))})"
        for k in expected
        if k in state and k not in fitting and not k.startswith(head)
    ]
    problems = [
        f"{len(keys)} {what}: {_listed(keys)}"
        for what, keys in (("keys missing", missing), ("keys unknown", foreign), ("of another shape", reshaped))
        if keys
    ]
    if problems:
        raise UsageError(f"{config.weights} does not fit {config.label}: {'; '.join(problems)}")
    return fitting


def _listed(names: list[str]) -> str:
    return ", ".join([*names[:4], *(["…"] if len(names) > 4 else [])])  # noqa: PLR2004


def _resize_positions(
    state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], image_size: int
) -> dict[str, torch.Tensor]:
    """Interpolate a vision transformer's position embeddings to another image size, as torchvision does."""
    name = "encoder.pos_embedding"
    if state[name].shape == expected[name].shape:
        return state
    patch = expected["conv_proj.weight"].shape[-1]
    if state[name].device.type == "meta":
        return {**state, name: expected[name]}
    resized: dict[str, torch.Tensor] = interpolate_embeddings(image_size, patch, OrderedDict(state))
    return resized


class FineTunedModel:
    """A network, where its head is, and what of it is frozen in an epoch.

    Args:
        module: the network.
        config: the recipe's ``model``.
        head: dotted names of its layers that are new for a new number of classes; None: as the architecture has it.
    """

    def __init__(self, module: nn.Module, config: ModelConfig, head: Sequence[str] | None = None) -> None:
        self.module = module
        self.head = head_modules(config.arch) if head is None else tuple(head)
        self._config = config
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
        frozen = self.matching(self._config.freeze) | self._frozen_by_factory
        for start, patterns in self._config.unfreeze.items():
            if start <= epoch:
                names = [patterns] if isinstance(patterns, str) else patterns
                frozen -= self.matching(names)
        return frozen

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


def build_model(recipe: Recipe, *, num_classes: int, image_size: int, with_weights: bool) -> FineTunedModel:
    """The model of a recipe on the host.

    Args:
        recipe: names it.
        num_classes: outputs.
        image_size: pixels.
        with_weights: read the starting weights; only rank 0 needs to, DDP hands them on.
    """
    torch.manual_seed(recipe.seed)
    seed_generators(recipe.seed)
    module = build_module(recipe.model, num_classes=num_classes, image_size=image_size)
    head = user_model.head_of(module, recipe.model, num_classes=num_classes) if recipe.model.factory else None
    if with_weights:
        load_weights(module, recipe.model, image_size=image_size, head=head)
    return FineTunedModel(module, recipe.model, head)
