"""Every torchvision classification model with its weights, read from torchvision's source without importing it.

Importing torchvision takes seconds and imports torch; a recipe is checked and `launch models` prints in a fraction of
one. So the files ``torchvision/models/*.py`` are parsed, and the few forms in which they describe weights evaluated.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from launcher.errors import LaunchError, UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT = "DEFAULT"
"""The name under which torchvision keeps a model's best weights."""
DEFAULT_IMAGE_SIZE = 224
"""Pixels, for a model without weights: what ImageNet models are commonly trained at."""

# The defaults of torchvision.transforms._presets.ImageClassification.
_PRESET = {
    "resize_size": 256,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
}


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """Pretrained weights of one model, and the preprocessing they were measured with."""

    name: str
    """As a recipe names them: IMAGENET1K_V2."""
    url: str
    """Where torchvision downloads them from."""
    file_name: str
    """Name in torch.hub's cache: the last part of the url."""
    image_size: int
    """Height and width in pixels of the centre crop that the model sees."""
    resize_size: int
    """Pixels of the short side before the crop."""
    interpolation: str
    """Of the resize: bilinear or bicubic."""
    mean: tuple[float, float, float]
    """Subtracted per RGB channel, of values from 0 to 1."""
    std: tuple[float, float, float]
    """Divided by per RGB channel."""
    top1: float | None
    """Fraction of ImageNet's validation images; None: not a classifier (vgg16's IMAGENET1K_FEATURES)."""
    top5: float | None
    """The same for the five likeliest classes."""
    num_params: int
    """Parameters with ImageNet's 1,000 classes."""
    gflops: float
    """1e9 multiply-adds per image."""
    file_size_mb: float
    """Size of the download, in MB as torchvision counts them (2**20 bytes)."""


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One architecture and the weights there are for it."""

    arch: str
    """As a recipe names it: resnet50."""
    weights: tuple[WeightsEntry, ...]
    """In torchvision's order."""
    default: str | None
    """Name of the weights that DEFAULT stands for; None: there are none."""

    def find_weights(self, name: str) -> WeightsEntry:
        """The weights called ``name``, or those that DEFAULT stands for.

        Raises:
            UsageError: there are no such weights; lists those there are.
        """
        wanted = self.default if name == DEFAULT else name
        for entry in self.weights:
            if entry.name == wanted:
                return entry
        valid = [*([DEFAULT] if self.default else []), *(entry.name for entry in self.weights)]
        problem = f"found {name!r}; {self.arch} has no such weights;"
        known = f"valid: {', '.join(valid) or 'null (random)'}"
        raise UsageError(" ".join(filter(None, [problem, did_you_mean(name, valid), known])))


def weights_folder() -> Path:
    """Where torch keeps downloaded weights: as torch.hub.get_dir, which needs torch."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{base}/torch")).expanduser().absolute() / "hub" / "checkpoints"


@functools.cache
def classification_models() -> dict[str, ModelEntry]:
    """All models that torchvision registers for classification, by name, in alphabetical order.

    Raises:
        LaunchError: torchvision is not installed, or describes its weights in a form that is not known here.
    """
    spec = importlib.util.find_spec("torchvision")  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise LaunchError("torchvision is not installed in this environment; pip install torchvision")
    # Only the top folder: models of its subfolders detect, segment, or are quantized, and share the registry.
    folder = Path(spec.submodule_search_locations[0]) / "models"
    entries = [entry for file in folder.glob("*.py") for entry in _read_models(file)]
    return {entry.arch: entry for entry in sorted(entries, key=lambda entry: entry.arch)}


def find_model(arch: str) -> ModelEntry:
    """The model called ``arch``.

    Raises:
        UsageError: torchvision has no such classification model; names the nearest.
    """
    models = classification_models()
    if arch not in models:
        problem = f"found {arch!r}; torchvision has no such classification model;"
        hint = did_you_mean(arch.lower(), models)
        raise UsageError(" ".join(filter(None, [problem, hint, "`launch models` lists them"])))
    return models[arch]


def image_size(arch: str, weights: str | None) -> int:
    """Height and width in pixels that ``data.image_size: auto`` stands for.

    Args:
        arch: a model's name.
        weights: ``model.weights`` of the recipe. torchvision knows the size for its own names; for a file and for
            random weights it is that of the model's DEFAULT.

    Raises:
        UsageError: there is no such model.
    """
    entry = find_model(arch)
    sizes = {known.name: known.image_size for known in entry.weights}
    default = sizes.get(entry.default or "", DEFAULT_IMAGE_SIZE)
    return sizes.get(weights or DEFAULT, default)


def _read_models(file: Path) -> Iterator[ModelEntry]:
    """The models that one file registers; the enum of a model's weights stands in the same file, before it."""
    text = file.read_text(encoding="utf-8")
    if "@register_model" not in text:
        return
    constants: dict[str, ast.expr] = {}
    enums: dict[str, tuple[tuple[WeightsEntry, ...], str | None]] = {}
    for node in ast.parse(text).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                constants[name] = value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                constants[name] = value
            case ast.ClassDef(name=name, bases=[ast.Name(id="WeightsEnum")]):
                enums[name] = _read_enum(node, constants, file)
            case ast.FunctionDef(name=name):
                registered = _registered_name(node)
                if registered is not None:
                    weights, default = enums[_weights_class(node, enums, file)]
                    yield ModelEntry(arch=registered, weights=weights, default=default)
            case _:
                pass


def _read_enum(
    node: ast.ClassDef, constants: dict[str, ast.expr], file: Path
) -> tuple[tuple[WeightsEntry, ...], str | None]:
    """The members of a WeightsEnum, and the name of the member that DEFAULT is an alias of."""
    entries, default = [], None
    for member in node.body:
        match member:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call):
                try:
                    entries.append(_weights_entry(name, _evaluate(call, constants)))
                except (KeyError, TypeError, ValueError) as error:
                    raise _unknown_form(file, member, name) from error
            case ast.Assign(targets=[ast.Name(id="DEFAULT")], value=ast.Name(id=name)):
                default = name
            case _:
                pass
    return tuple(entries), default


def _weights_entry(name: str, value: dict[str, Any]) -> WeightsEntry:
    transforms, meta = {**_PRESET, **value["transforms"]}, value["meta"]
    accuracy = meta["_metrics"]["ImageNet-1K"]
    url = value["url"]
    # int(), float() and tuple() refuse the None that an imported name evaluates to.
    return WeightsEntry(
        name=name,
        url=url,
        file_name=PurePosixPath(urlparse(url).path).name,
        image_size=int(transforms["crop_size"]),
        resize_size=int(transforms["resize_size"]),
        interpolation=transforms["interpolation"],
        mean=tuple(transforms["mean"]),
        std=tuple(transforms["std"]),
        top1=_fraction(accuracy["acc@1"]),
        top5=_fraction(accuracy["acc@5"]),
        num_params=int(meta["num_params"]),
        gflops=float(meta["_ops"]),
        file_size_mb=float(meta["_file_size"]),
    )


def _fraction(percent: float) -> float | None:
    return None if math.isnan(percent) else percent / 100


def _registered_name(function: ast.FunctionDef) -> str | None:
    """The name under which ``@register_model()`` or ``@register_model(name="…")`` registers a function, if it does."""
    for decorator in function.decorator_list:
        match decorator:
            case ast.Call(func=ast.Name(id="register_model"), args=[], keywords=[]):
                return function.name
            case ast.Call(func=ast.Name(id="register_model")):
                given = [*decorator.args, *(keyword.value for keyword in decorator.keywords)]
                return str(_evaluate(given[0], {}))
    return None


def _weights_class(function: ast.FunctionDef, enums: dict[str, Any], file: Path) -> str:
    """The enum in the annotation of the parameter ``weights``: ``Optional[ResNet50_Weights]``."""
    for argument in (*function.args.args, *function.args.kwonlyargs):
        if argument.arg == "weights" and argument.annotation is not None:
            for node in ast.walk(argument.annotation):
                if isinstance(node, ast.Name) and node.id in enums:
                    return node.id
    raise _unknown_form(file, function, function.name)


def _evaluate(node: ast.expr, constants: dict[str, ast.expr]) -> Any:  # noqa: PLR0911 - a return for each form
    """The value of an expression in one of the forms that describe weights.

    The value of a call is its keyword arguments as a dict (``Weights(…)``, ``partial(ImageClassification, …)``), that
    of an enum's member is its name in lower case (``InterpolationMode.BICUBIC``), and that of an imported name is None,
    since nothing that is needed here is imported.

    Raises:
        ValueError: the expression has another form.
    """
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return _evaluate(constants[name], constants) if name in constants else None
        case ast.Attribute(attr=name):
            return name.lower()
        case ast.Tuple(elts=elements):
            return tuple(_evaluate(element, constants) for element in elements)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _evaluate(left, constants) / _evaluate(right, constants)
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str() as text)]):
            return float(text)
        case ast.Call(keywords=keywords):
            return {str(keyword.arg): _evaluate(keyword.value, constants) for keyword in keywords}
        case ast.Dict():
            items: dict[Any, Any] = {}
            for key, item in zip(node.keys, node.values, strict=True):
                found = _evaluate(item, constants)
                items.update(found if key is None else {_evaluate(key, constants): found})  # no key: {**found}
            return items
        case _:
            raise ValueError(ast.unparse(node))


def _unknown_form(file: Path, node: ast.stmt, name: str) -> LaunchError:
    return LaunchError(
        f"{file}:{node.lineno}: this version of torchvision describes {name} in a form that this version of "
        "finetune-launcher cannot read; install a torchvision that it was tested with, or a newer finetune-launcher"
    )
