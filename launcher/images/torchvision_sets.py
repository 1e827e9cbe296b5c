"""torchvision's own data sets, written once as image folders: images that are files become links to them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

FEW_CLASSES = 10
_TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_VAL_TEST = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}


@dataclass(frozen=True)
class TorchvisionSet:
    """A class of ``torchvision.datasets``."""

    splits: Mapping[str, Mapping[str, Any]]
    """What it is called with for each folder that is written; "": the folder itself, to be divided."""
    needs: str | None = None
    """A module that torchvision imports to read it."""


SETS = {
    "CIFAR10": TorchvisionSet(_BY_FLAG),
    "CIFAR100": TorchvisionSet(_BY_FLAG),
    "Caltech101": TorchvisionSet({"": {}}),
    "Caltech256": TorchvisionSet({"": {}}),
    "Country211": TorchvisionSet({"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}}),
    "DTD": TorchvisionSet(_TRAIN_VAL_TEST),
    "EuroSAT": TorchvisionSet({"": {}}),
    "FGVCAircraft": TorchvisionSet(_TRAIN_VAL_TEST),
    "FashionMNIST": TorchvisionSet(_BY_FLAG),
    "Flowers102": TorchvisionSet(_TRAIN_VAL_TEST, needs="scipy"),
    "Food101": TorchvisionSet(_TRAIN_TEST),
    "GTSRB": TorchvisionSet(_TRAIN_TEST),
    "Imagenette": TorchvisionSet({"train": {"split": "train"}, "val": {"split": "val"}}),
    "KMNIST": TorchvisionSet(_BY_FLAG),
    "MNIST": TorchvisionSet(_BY_FLAG),
    "OxfordIIITPet": TorchvisionSet({"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "RenderedSST2": TorchvisionSet(_TRAIN_VAL_TEST),
    "STL10": TorchvisionSet(_TRAIN_TEST),
    "SUN397": TorchvisionSet({"": {}}),
    "SVHN": TorchvisionSet(_TRAIN_TEST, needs="scipy"),
    "StanfordCars": TorchvisionSet(_TRAIN_TEST, needs="scipy"),
    "USPS": TorchvisionSet(_BY_FLAG),
}
"""By the name of the class."""


def write(target: Path, *, name: str, root: Path, download: bool) -> None:
    """Write a data set's splits into a folder.

    Args:
        target: where.
        name: of SETS.
        root: the folder that torchvision's class is told.
        download: whether what is missing there is downloaded.

    Raises:
        UsageError: it is not there, or cannot be downloaded; says what to do.
    """
    import torchvision.datasets

    make = functools.partial(getattr(torchvision.datasets, name), root=str(root), download=download)
    for split, arguments in SETS[name].splits.items():
        try:
            found = make(**arguments)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(_not_there(name, root, error, download=download)) from None
        _write_split(found, target / split)


def _not_there(name: str, root: Path, error: Exception, *, download: bool) -> str:
    fetch = f"python -c \"import torchvision; torchvision.datasets.{name}('FOLDER', download=True)\""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if download:
        return f"{name} cannot be downloaded ({first}); where there is a network: {fetch}; then data.path=FOLDER here"
    return f"{name} is not in {root} as torchvision keeps it ({first}); where there is a network: {fetch}"


def _write_split(found: Any, folder: Path) -> None:
    """A folder for each class, with links to the image files or, of a data set of arrays, with PNG files."""
    files = _files(found)
    labels = [label for _, label in files] if files else [int(found[index][1]) for index in range(len(found))]
    names = _class_names(found, max(labels, default=0) + 1)
    for label in set(labels):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
    for number, label in enumerate(labels):
        place = folder / names[label] / f"{number:07d}"
        if files:
            place.with_suffix(files[number][0].suffix.lower()).symlink_to(files[number][0].absolute())
        else:
            found[number][0].save(place.with_suffix(".png"), compress_level=1)


def _files(found: Any) -> list[tuple[Path, int]]:
    """Files and classes of a data set that holds its images as files, by which none has to be decoded; else none."""
    for name in ("samples", "_samples"):
        if hasattr(found, name):
            return [(Path(file), int(label)) for file, label in getattr(found, name)]
    for name in ("_image_files", "_images"):
        if hasattr(found, name):
            pairs = zip(getattr(found, name), found._labels, strict=True)  # noqa: SLF001
            return [(Path(file), int(label)) for file, label in pairs]
    return []


def _class_names(found: Any, num: int) -> list[str]:
    """Names that can be those of folders; numbers where the data set has no names."""
    names = getattr(found, "classes", None) or getattr(found, "categories", None)
    if names is None:
        return [f"{label:03d}" if num > FEW_CLASSES else str(label) for label in range(num)]
    return [(name[0] if isinstance(name, tuple) else str(name)).replace("/", "-").strip() for name in names]
