"""The samples of a split, whoever made them: their keys and classes, and what is random about one of them."""

from __future__ import annotations

import functools
import hashlib
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from launcher.engine.loading.handover import Batch
from launcher.engine.schedule import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def names_of(label: int | Sequence[int], classes: Sequence[str]) -> str | list[str]:
    """The name of a sample's class; of several a list."""
    return classes[label] if isinstance(label, int) else [classes[one] for one in label]


class Samples(Dataset[Batch]):
    """One split of a data set.

    Args:
        transform: from what :meth:`load` gives to an image for the model, 3 x S x S.
        seed: the recipe's; the randomness of a sample follows from (seed, epoch, index).
    """

    classes: list[str]
    """Names in the order of the logits."""
    samples: list[tuple[str, Any]]
    """Path, or another key, and class of each; with data.task: multi_label a tuple of classes."""
    weights: list[float] | None = None
    """What the loss of each counts beside others' in training; None: all the same."""

    def __init__(self, transform: Callable[[Any], torch.Tensor], *, seed: int) -> None:
        self._transform = transform
        self._seed = seed

    def key(self, index: int) -> str:
        """What a sample is known by in the run's files."""
        return self.samples[index][0]

    def load(self, index: int) -> Any:
        """The image of a sample, as the transform takes it."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> tuple[Any, ...]:
        """The class of each; with data.task: multi_label a tuple of classes."""
        return tuple(label for _, label in self.samples)

    def target(self, index: int) -> torch.Tensor:
        """The class of a sample, int64; of several which they are, float32 C."""
        label = self.samples[index][1]
        if isinstance(label, int):
            return torch.tensor(label)
        found = torch.zeros(len(self.classes))
        found[list(label)] = 1.0
        return found

    @functools.cached_property
    def digest(self) -> str:
        """Of the samples' keys and their classes, in their order, and of their weights, where they have any."""
        return self._digest("" if self.weights is None else repr(self.weights))

    @property
    def digest_of_images(self) -> str:
        """:attr:`digest` without weights."""
        return self._digest("")

    def _digest(self, weights: str) -> str:
        digest = hashlib.sha256()
        for index, (_, label) in enumerate(self.samples):
            digest.update(f"{label} {self.key(index)}\n".encode(errors="surrogateescape"))
        digest.update(weights.encode())
        return digest.hexdigest()

    def find(self, keys: frozenset[str]) -> frozenset[int]:
        """Indices of the samples with these keys."""
        return frozenset(index for index in range(len(self)) if self.key(index) in keys) if keys else frozenset()

    def __getitem__(self, position: tuple[int, int]) -> Batch:
        """The image at (epoch, index), uint8 or, of the user's own transform, float 3 x S x S; its :meth:`target`."""
        epoch, index = position
        seed_generators(derive_seed(self._seed, epoch, index))
        return self._transform(self.load(index)), self.target(index)


def seed_generators(seed: int) -> None:
    """Have all that is random from here on follow from ``seed``, in the user's code too.

    Only the CPU's generator of torch: torch.manual_seed would also queue work for every GPU.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  what the user's code may use
