"""A transform of the user's own: made for training or for validation, and what it returns is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torchvision.transforms import v2

from launcher.errors import UsageError
from launcher.recipe.user_code import as_in_run
from launcher.runs import user_code

if TYPE_CHECKING:
    from launcher.recipe.schema_data import DataConfig


class UserTransform:
    """Calls it on an image, and checks what comes.

    Args:
        config: the recipe's ``data``.
        train: made for training, or for validation.
        image_size: pixels of what has to come.
        from_file: images come from files, as tensors; it gets them as Pillow's, as most transforms want them.
        facts: mean, std and interpolation, where its signature names them.

    Raises:
        UsageError: what is made cannot be called.
    """

    def __init__(self, config: DataConfig, *, train: bool, image_size: int, from_file: bool, facts: Any) -> None:
        assert config.transform  # noqa: S101
        self._name = as_in_run(config.transform)
        self._size = image_size
        self._from_file = from_file
        function = user_code.load(config.transform)
        self._function = user_code.call(
            "data.transform", function, config.transform_args, train=train, image_size=image_size, **facts
        )
        if not callable(self._function):
            kind = type(self._function).__name__
            raise UsageError(f"{self._name}(train={train}) returned {kind}, which cannot be called on an image")

    def __call__(self, image: Any) -> torch.Tensor:
        """From an image of Pillow's, or what the user's own data set gives, to float32 3 x S x S.

        Raises:
            UsageError: something else comes.
        """
        if self._from_file:
            image = v2.functional.to_pil_image(image)  # type: ignore[no-untyped-call]
        found = self._function(image)
        if isinstance(found, torch.Tensor) and found.is_floating_point() and found.shape == (3, self._size, self._size):
            return found.as_subclass(torch.Tensor).float().contiguous()
        what = type(found).__name__
        if isinstance(found, torch.Tensor):
            what = f"{str(found.dtype).removeprefix('torch.')} {' x '.join(map(str, found.shape))}"
        raise UsageError(
            f"{self._name} returned {what} for an image; it must return a float tensor of 3 x {self._size} x "
            f"{self._size} (data.image_size), normalised as the model wants it"
        )
