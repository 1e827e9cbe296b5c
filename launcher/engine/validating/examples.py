"""The same few validation images through the epochs, each with what the model answers: people see answers change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.distributed import sum_over_ranks
from launcher.engine.loading.samples import names_of
from launcher.engine.schedule import epoch_order, split_by_shares

if TYPE_CHECKING:
    from launcher.engine.loading.samples import Samples
    from launcher.engine.setup import Parts
    from launcher.engine.validating.noise import Answers

NUM_IMAGES = 16
SALT = 0x65786D
"""In the place of an epoch: their order is that of no epoch of training."""
MOST_LOOKED_AT = 10_000
"""Of the first so many images in that order some are chosen, so that it takes no time with millions of them."""


def choose(images: Samples, seed: int) -> list[int]:
    """Indices of the images, the same for the same data and seed: in turn one of each class, in a random order.

    Args:
        images: of validation.
        seed: the recipe's.
    """
    order = epoch_order(seed, SALT, len(images))[:MOST_LOOKED_AT].tolist()
    turns: dict[Any, int] = {}
    in_turn = []
    for place, index in enumerate(order):
        label = images.samples[index][1]
        turns[label] = turn = turns.get(label, 0) + 1
        in_turn.append((turn, place, index))
    return [index for _, _, index in sorted(in_turn)[:NUM_IMAGES]]


class Examples:
    """Of one rank.

    Args:
        parts: data and who we are.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._chosen = choose(parts.val_set, parts.recipe.seed)

    @property
    def places(self) -> dict[int, int]:
        """Those of this rank: the number of each, and its place in the rank's share of the validation set."""
        parts = self._parts
        shares = split_by_shares(len(parts.val_set), parts.schedule.batching.shares)
        start, end = shares[parts.ranks.rank]
        return {number: index - start for number, index in enumerate(self._chosen) if start <= index < end}

    def rows(self, answers: Answers) -> list[dict[str, Any]]:
        """Each with its true class and the answer, ``{image, true, predicted, confidence}``. Every rank must call it.

        With several classes an image, ``true`` and ``predicted`` are lists, and ``confidence`` the least sure class's;
        None: it is no number, as of weights that are none.
        An image that was not answered (``--debug``) is left out.

        Args:
            answers: of a validation.
        """
        names, images = self._parts.classes, self._parts.val_set
        found = torch.zeros(NUM_IMAGES, 3 + len(names), dtype=torch.float64, device=self._parts.device.torch_device)
        for number, place in self.places.items():  # columns: is answered, confidence, class, or which classes
            if answers.several and place in answers.several.picked:
                found[number, 0] = 1
                found[number, 1] = answers.several.picked[place][0]
                found[number, 3:] = answers.several.picked[place][1:]
            elif answers.confidences is not None and place < len(answers.pairs):
                found[number, 0] = 1
                found[number, 1] = answers.confidences[place]
                found[number, 2] = answers.pairs[place] % len(names)
        rows, chosen = [], self._chosen
        of_all = sum_over_ranks(found).tolist()[: len(chosen)]
        for index, (known, confidence, predicted, *said) in zip(chosen, of_all, strict=True):
            label = images.samples[index][1]
            answer = int(predicted) if isinstance(label, int) else [place for place, one in enumerate(said) if one]
            if known:
                sure = round(confidence, 6) if math.isfinite(confidence) else None
                said_of = {"true": names_of(label, names), "predicted": names_of(answer, names), "confidence": sure}
                rows.append({"image": images.key(index)} | said_of)
        return rows
