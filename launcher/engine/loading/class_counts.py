"""How many samples each class has, and what it counts by that in the loss."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from launcher.engine.loading.balance import class_weights

if TYPE_CHECKING:
    from launcher.engine.loading.data_sets import DataSets
    from launcher.engine.loading.samples import Samples


def weigh(images: DataSets, classes: int, *, several: bool) -> list[float]:
    """What the loss of a sample of each class counts, by the samples that take part.

    With ``several`` classes a sample: what having the class counts beside not having it, so that both count alike.
    """
    excluded = images.train.find(images.left_out)
    counts = count_classes(images.train, excluded)
    of_class = [counts[label] for label in range(classes)]
    if several:
        num = len(images.train) - len(excluded)
        return [(num - count) / count if count else 1.0 for count in of_class]
    return class_weights(of_class)


def count_classes(samples: Samples, left_out: frozenset[int]) -> Counter[int]:
    """Samples of each class, of several each."""
    labels = (label for index, label in enumerate(samples.labels) if index not in left_out)
    return Counter(one for label in labels for one in ([label] if isinstance(label, int) else label))
