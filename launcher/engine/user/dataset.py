"""A data set of the user's own, seen as one of ours."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torchvision.transforms import v2

from launcher.engine.loading.samples import Samples
from launcher.errors import UsageError
from launcher.images import pixels
from launcher.images.listing import every_image_has_all
from launcher.recipe.user_code import as_in_run
from launcher.runs import user_code

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.recipe.schema_data import DataConfig

NEEDS = {
    "classes": "a list of the classes' names",
    "__len__": "the number of samples",
    "__getitem__": "of i: the image, of Pillow or uint8 3 x H x W, and its class",
    "key": "of i: text that names the sample, such as its path",
    "label": "of i: its class, without reading the image",
}
"""What a data set must have; ``samples``, a list of (key, class) as torchvision's have it, stands for the last two."""
CHANNELS = 3


class UserDataset(Samples):
    """One split of what ``data.dataset`` returns.

    Args:
        config: the recipe's ``data``.
        split: train or val.
        transform: of the recipe, or the user's own, which gets the image as the data set gives it.
        seed: the recipe's.
        left_out: keys that are no samples; of training images the schedule leaves them out.
        classes: what the classes have to be; None: whatever they are.

    Raises:
        UsageError: the object lacks something, or says what cannot be.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        transform: Callable[[Any], torch.Tensor],
        *,
        seed: int,
        left_out: frozenset[str] = frozenset(),
        classes: list[str] | None = None,
    ) -> None:
        super().__init__(transform, seed=seed)
        assert config.dataset  # noqa: S101
        self._config = config
        self._split = split
        self._name = f"{as_in_run(config.dataset)}(split={split!r})"
        function = user_code.load(config.dataset)
        self._made = user_code.call("data.dataset", function, config.dataset_args, split=split, path=config.path)
        self._check_parts()
        self.classes = [str(name) for name in self._made.classes]
        if len(set(self.classes)) < max(2, len(self.classes)):
            raise UsageError(f"{self._name}: its classes are {self.classes[:5]}; they must be two or more, and differ")
        known = classes or self.classes
        if self.classes != known[: len(self.classes)]:
            raise UsageError(f"{self._name}: its classes are {self.classes[:5]}, and those of training {known[:5]}")
        listed = [self._describe(index) for index in range(len(self._made))]
        self._indices = [index for index, (key, _) in enumerate(listed) if key not in left_out]
        self.samples = [listed[index] for index in self._indices]
        self._check_samples(listed)
        if split == "train" and (problem := every_image_has_all([label for _, label in listed], len(self.classes))):
            raise UsageError(f"{self._name}: {problem}")

    def load(self, index: int) -> Any:
        """The image: as the data set gives it for the user's own transform, else uint8 3 x H x W."""
        place = self._indices[index]
        key, label = self.samples[index]
        try:
            image, found = self._made[place]
        except (StopIteration, SystemExit) as error:  # which would end a loop of ours, or this process
            raise RuntimeError(f"{type(error).__name__} in sample {place} ({key}) of {self._name}") from error
        except Exception as error:
            error.add_note(f"in sample {place} ({key}) of {self._name}")
            raise
        if self._as_label(found) != label:
            raise UsageError(
                f"{self._name}: sample {place} ({key}) has the class {found} and label({place}) is {label}"
            )
        return image if self._config.transform else self._as_tensor(image, f"sample {place} ({key})")

    def _as_tensor(self, image: Any, what: str) -> torch.Tensor:
        if isinstance(image, Image):
            config = self._config
            rgb = pixels.to_rgb(image, config.background_rgb, config.grey_limits)
            return v2.functional.pil_to_tensor(rgb)
        if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == CHANNELS:
            if len(image) == 1:
                return image.expand(CHANNELS, -1, -1)
            if len(image) == CHANNELS:
                return image
        shown = type(image).__name__
        if isinstance(image, torch.Tensor):
            shown = f"{str(image.dtype).removeprefix('torch.')} {' x '.join(map(str, image.shape))}"
        raise UsageError(
            f"{self._name}: {what} is {shown}; it must be an image of Pillow or a uint8 tensor of 3 x H x W "
            "(another kind goes with your own data.transform)"
        )

    def _check_parts(self) -> None:
        made = self._made
        missing = [name for name in NEEDS if not hasattr(made, name)]
        if hasattr(made, "samples"):
            missing = [name for name in missing if name not in ("key", "label")]
        if hasattr(made, "targets"):
            missing = [name for name in missing if name != "label"]
        if missing:
            lacks = "; ".join(f"{name} ({NEEDS[name]})" for name in missing)
            raise UsageError(f"{self._name} returned a {type(made).__name__}, which lacks {lacks}")

    def _as_label(self, label: Any) -> Any:
        """A class as a number, or several, each once, as a sorted tuple; None: it is neither."""
        if self._config.task != "multi_label":
            return _as_int(label)
        try:
            found = [None if _is_bool(one) else _as_int(one) for one in label]
        except TypeError:
            return None
        numbers = sorted({one for one in found if one is not None})
        return tuple(numbers) if len(numbers) == len(found) else None  # else it may be a 0 or 1 for each class

    def _describe(self, index: int) -> tuple[str, Any]:
        made = self._made
        key = made.key(index) if hasattr(made, "key") else made.samples[index][0]
        if hasattr(made, "label"):
            label = made.label(index)
        else:
            label = made.targets[index] if hasattr(made, "targets") else made.samples[index][1]
        number = self._as_label(label)
        several = self._config.task == "multi_label"
        if number is None or not all(0 <= one < len(self.classes) for one in (number if several else [number])):
            valid = (
                "a list of numbers (data.task: multi_label), those of its classes, each once,"
                if several
                else "a number"
            )
            raise UsageError(
                f"{self._name}: the class of sample {index} ({key}) is {label!r}; it must be {valid} from 0 to "
                f"{len(self.classes) - 1}, of {len(self.classes)} classes"
            )
        inside, split = str(key).removeprefix(f"{self._config.path}/"), f"{self._split}/"
        return inside if inside.startswith(split) else f"{split}{inside}", number  # the same in both is another sample

    def _check_samples(self, listed: list[tuple[str, Any]]) -> None:
        if not listed:
            raise UsageError(f"{self._name} has no samples: its __len__ is 0")
        seen: dict[str, int] = {}
        for index, (key, _) in enumerate(listed):
            if seen.setdefault(key, index) != index:
                raise UsageError(f"{self._name}: samples {seen[key]} and {index} have the same key, {key!r}")


def _is_bool(one: Any) -> bool:
    """Of Python, NumPy or torch."""
    return isinstance(one, bool) or str(getattr(one, "dtype", "")) in ("bool", "torch.bool")


def _as_int(label: Any) -> int | None:
    """A class as Python's number; None: it is none."""
    if isinstance(label, torch.Tensor) and (label.numel() != 1 or label.is_floating_point()):
        return None
    try:
        return operator.index(label.item() if hasattr(label, "item") else label)
    except (TypeError, ValueError):
        return None
