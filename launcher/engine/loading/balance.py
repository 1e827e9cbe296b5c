"""Classes of different sizes (``data.balance``): seen evenly, or weighed in the loss. Pure functions of numbers.

The order of an evenly seen epoch is as long as that of any other, and a function of (seed, epoch, classes of the
samples). Each class has as many places as any other but for one, and its samples take turns in them from epoch to
epoch: over all epochs every sample of a class is seen as often as any other of it but for one. (So with
``data.balance: sampler`` an epoch has each sample of a small class several times, and of a large class not all.)
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from launcher.errors import UsageError
from launcher.images.folder import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from launcher.engine.device import Device


def class_weights(counts: Sequence[float]) -> list[float]:
    """What the loss of a sample of each class counts: one over its class's size, the mean over all samples is 1."""
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 0.0 for count in counts]


def count_classes(labels: Sequence[int | tuple[int, ...]], left_out: frozenset[int]) -> Counter[int]:
    """Samples of each class, of several each where they have several.

    Args:
        labels: class of each sample, or its classes.
        left_out: indices of samples that take no part.
    """
    found = (label for index, label in enumerate(labels) if index not in left_out)
    return Counter(one for label in found for one in ([label] if isinstance(label, int) else label))


def weights_in_loss(
    labels: Sequence[int | tuple[int, ...]],
    left_out: frozenset[int],
    *,
    num_classes: int,
    several: bool,
    given: Sequence[float] | None = None,
) -> list[float]:
    """What the loss of a sample of each class counts, by the samples that take part.

    With ``several`` classes a sample: what having the class counts beside not having it, so that both count alike;
    1 where all samples have it, or none. With weights ``given`` by a list a sample counts as many as its weight says,
    so that classes count alike with both.
    """
    sizes = [0.0] * num_classes
    total = 0.0
    for index, label in enumerate(labels):
        if index not in left_out:
            size = 1.0 if given is None else given[index]
            total += size
            for one in [label] if isinstance(label, int) else label:
                sizes[one] += size
    if several:
        return [(total - size) / size if 0 < size < total else 1.0 for size in sizes]
    return class_weights(sizes)


class SampleWeights:
    """What the loss of each training image counts, as a list says; the mean over those that are seen is made 1.

    Args:
        weights: of all.
        left_out: indices of those that take no part.
        device: where losses are.
        evenly: class of each image, where an epoch sees classes evenly (:func:`balanced_order`).

    Raises:
        UsageError: all that take part have the weight 0.
    """

    def __init__(
        self,
        weights: Sequence[float],
        left_out: frozenset[int],
        device: Device,
        *,
        evenly: Sequence[int] | None = None,
    ) -> None:
        taking_part = [index for index in range(len(weights)) if index not in left_out]
        sizes = Counter(evenly or ())  # also of those left out, whose places are dealt, too
        seen = {index: 1 / sizes[evenly[index]] if evenly else 1.0 for index in taking_part}
        mean = math.fsum(weights[index] * often for index, often in seen.items()) / (math.fsum(seen.values()) or 1.0)
        if not mean:
            raise UsageError("the weights of all training images that can be decoded are 0, so that nothing is learned")
        self._weights = torch.tensor(weights, dtype=torch.float64) / mean
        self._device = device

    def of(self, indices: Sequence[int]) -> torch.Tensor:
        """Those of some images, float64, on the device."""
        # Not by Device.send, whose copies wait in line behind that of the next batch.
        return self._device.bring(self._weights[list(indices)])


def balanced_order(seed: int, epoch: int, labels: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order of an epoch that sees classes evenly.

    Args:
        seed: the recipe's.
        epoch: from 0.
        labels: class of each sample.

    Returns:
        Of each place the index of its sample, and how often that sample was in this epoch before.
    """
    classes = np.asarray(labels)
    by_class = np.argsort(classes, kind="stable")
    members = np.split(by_class, np.flatnonzero(np.diff(classes[by_class])) + 1)
    num, chosen = len(labels), []
    for rank, of_class in enumerate(members):
        # Places of all epochs in one line, dealt to the classes in turn.
        first, end = (-(-(num * number - rank) // len(members)) for number in (epoch, epoch + 1))
        rounds, places = np.divmod(np.arange(first, end), len(of_class))
        for number in range(rounds[0], rounds[-1] + 1) if end > first else ():
            keys = _random(seed, number, len(of_class), label=rank)
            chosen.append(of_class[np.argsort(keys, kind="stable")][places[rounds == number]])
    indices = np.concatenate(chosen).astype(np.int64)
    indices = indices[np.argsort(_random(seed, epoch, num), kind="stable")]
    return indices, _times_before(indices)


def _random(seed: int, number: int, num: int, *, label: int | None = None) -> NDArray[np.uint64]:
    """Philox's raw output, which numpy keeps the same for ever; of a class that of another counter."""
    counter = [0, 0, 0, 0 if label is None else label + 1]
    return np.random.Philox(key=np.array([seed, number], dtype=np.uint64), counter=counter).random_raw(num)


def _times_before(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each value came before."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(values[order]) > 0])
    lengths = np.diff(np.r_[starts, len(values)])
    found = np.empty_like(values)
    found[order] = np.arange(len(values)) - np.repeat(starts, lengths)
    return found


def describe(total: int, counts: dict[str, int], balance: str, *, weighed: bool = False, most: int = 12) -> str:
    """How many training images there are and each class has, and what is done about it; a line for people."""
    sizes = Counter(counts.values())
    if len(counts) > most:
        middle = sorted(counts.values())[len(counts) // 2]
        shown = f"{min(sizes):,} to {max(sizes):,} in each, the median is {middle:,}"
    else:
        shown = ", ".join(f"{printable(name)} {count:,}" for name, count in counts.items())
    done = {"weights": "losses are weighed by class", "sampler": "each class is seen as often as any other"}
    text = f"{total:,} training images in {len(counts)} classes: {shown}"
    text += f"; {done[balance]} (data.balance)" if balance in done else ""
    return f"{text}; the loss of each counts by its weight in the list" if weighed else text
