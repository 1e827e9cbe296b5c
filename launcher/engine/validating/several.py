"""What is kept of a validation's answers where an image has any number of classes: counts, and the surest of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from launcher.engine.distributed import gather_rows

if TYPE_CHECKING:
    from collections.abc import Collection

NUM_IMAGES = 12
"""Wrong and right answers that are kept, each: what a screen shows."""


@dataclass(frozen=True, kw_only=True)
class SeveralAnswers:
    """Of all ranks, but for the surest answers, which are this rank's."""

    counts: torch.Tensor
    """Of each class images that were rightly said to have it, that have it, that were said to; int64 3 x C."""
    surest: Surest
    picked: dict[int, torch.Tensor] = field(default_factory=dict)
    """As :attr:`Picked.rows`."""


class Surest:
    """The surest of a rank's wrong and right answers, whatever the number of images.

    An image is answered wrongly if any of its classes is. It is as sure as the surest of the classes that are wrong, or
    as the least sure of all where all are right.

    Args:
        num_classes: outputs of the model.
        device: where probabilities will be.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        self._num_seen = 0
        none = torch.empty(0, 2 + 2 * num_classes, dtype=torch.float64, device=device)
        self._wrong, self._right = none, none
        """Rows of place in the rank's share, confidence, which classes were said, which are true."""

    def add(self, probabilities: torch.Tensor, said: torch.Tensor, true: torch.Tensor) -> None:
        """Look at a batch of probabilities, which classes they say and which are true; N x C each."""
        sure, wrong = torch.where(said, probabilities, 1 - probabilities).double(), said != true
        places = torch.arange(self._num_seen, self._num_seen + len(said), device=said.device)
        self._num_seen += len(said)
        worst = sure.masked_fill(~wrong, -1.0).amax(dim=1)
        least = sure.amin(dim=1).masked_fill(wrong.any(dim=1), -1.0)
        rest = [said.double(), true.double()]
        self._wrong = most_sure(torch.cat([self._wrong, torch.cat([_columns(places, worst), *rest], dim=1)]))
        self._right = most_sure(torch.cat([self._right, torch.cat([_columns(places, least), *rest], dim=1)]))

    def gather(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Wrong and right ones of all ranks, with the image's index for its place. Every rank must call it.

        Args:
            indices: of this rank's images, in the order in which they were added.
        """
        of_places = torch.tensor([*indices, 0], dtype=torch.float64, device=self._wrong.device)
        found = []
        for rows in (self._wrong, self._right):
            known = rows[rows[:, 1] >= 0].clone()
            known[:, 0] = of_places[known[:, 0].long()]
            found.append(most_sure(gather_rows(known)).cpu())
        return found[0], found[1]


class Picked:
    """The answers for a few images of a rank's share.

    Args:
        places: of the images in the share.
    """

    def __init__(self, places: Collection[int]) -> None:
        self._places = places
        self._num_seen = 0
        self.rows: dict[int, torch.Tensor] = {}
        """By place: the confidence of the least sure class, and which classes were said; float64 1 + C."""

    def add(self, probabilities: torch.Tensor, said: torch.Tensor) -> None:
        """Look at a batch of probabilities and which classes they say; N x C each."""
        for place in self._places:
            row = place - self._num_seen
            if 0 <= row < len(said):
                sure = torch.where(said[row], probabilities[row], 1 - probabilities[row])
                self.rows[place] = torch.cat([sure.amin().reshape(1), said[row]]).double()
        self._num_seen += len(said)


def most_sure(rows: torch.Tensor) -> torch.Tensor:
    """The first NUM_IMAGES by their confidence, which is the second column."""
    return rows[rows[:, 1].argsort(descending=True, stable=True)[:NUM_IMAGES]]


def _columns(places: torch.Tensor, confidences: torch.Tensor) -> torch.Tensor:
    return torch.stack([places.double(), confidences], dim=1)
