"""Divides images into those to learn from and those to measure with: ``data.val_fraction``."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NO_CLASS = ("",)


def divide(
    keys: Sequence[str], labels: Sequence[tuple[str, ...]], groups: Sequence[str], *, fraction: float, seed: int
) -> set[int]:
    """Indices of the images for validation: a pure function of what it is told, whatever the order.

    Groups come in an order that follows from the seed and their names. Each is taken while it brings the classes nearer
    to their share, so that an image that is added or removed moves few others. Of each class something is left to
    learn from, and something taken to measure with, where it has two groups.

    Args:
        keys: what each image is known by.
        labels: the classes of each; those of none count as of one class of their own.
        groups: what each belongs to; images of one group stay together. Empty: each image is one of its own.
        fraction: of each class, for validation.
        seed: another one divides in another way.
    """
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(groups[index] if groups else key, []).append(index)
    counts = {
        name: Counter(label for index in found for label in labels[index] or NO_CLASS)
        for name, found in members.items()
    }
    order = sorted(members, key=lambda name: _rank(seed, name))
    totals = _sum(counts.values())
    num_groups = Counter(label for count in counts.values() for label in count)
    taken: Counter[str] = Counter()
    chosen: set[str] = set()

    def gain(name: str) -> float:
        """By how much nearer to their share the classes of a group come with it."""
        return sum(
            ((taken[label] - fraction * totals[label]) ** 2 - (taken[label] + num - fraction * totals[label]) ** 2)
            / totals[label]
            for label, num in counts[name].items()
        )

    def leaves_some(name: str) -> bool:
        return all(taken[label] + num < totals[label] for label, num in counts[name].items())

    for name in order:
        if gain(name) > 0 and leaves_some(name):
            chosen.add(name)
            taken.update(counts[name])
    for label in sorted(totals):
        if not taken[label] and num_groups[label] > 1:
            able = [name for name in order if name not in chosen and label in counts[name] and leaves_some(name)]
            if able:
                smallest = min(able, key=lambda name: sum(counts[name].values()))
                chosen.add(smallest)
                taken.update(counts[smallest])
    return {index for name in chosen for index in members[name]}


def _rank(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed} {name}".encode(errors="surrogateescape"), digest_size=16).digest()


def _sum(counts: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total
