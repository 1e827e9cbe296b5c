"""Which samples form which step, and which of them a rank takes: pure functions of numbers (invariants 1 and 2).

A position in training is (epoch, offset): how many samples of the epoch's order are behind it. Nothing else has to be
saved to go on from there, at the same world size or another.

A single image has no batch statistics (BatchNorm), and is a poor estimate of a gradient. So it is left alone only where
there is no other way:

- steps: where an epoch's last step would have less than half of the global batch, it and the one before it are of equal
  size (:func:`step_sizes`);
- ranks: where one would have a single sample of a step, samples are dealt in pairs (:func:`split_by_shares`);
- micro-batches: a rank that takes two at once takes three rather than one alone.

Where images are mixed in pairs (:mod:`launcher.engine.augmenting.mixing`), samples are always dealt in pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np

from launcher.engine.loading import balance

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed that is a function of ``numbers`` alone, on every machine and in every numpy (SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """The order of an epoch: a permutation of ``range(num_samples)``, int64.

    Sorted by Philox's raw output, which numpy keeps the same for ever; ``Generator.permutation`` makes no such promise.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_samples)
    return np.argsort(keys, kind="stable").astype(np.int64)


def step_sizes(num: int, global_size: int) -> list[int]:
    """How many samples each step has that takes ``num`` samples to an epoch's end.

    The global batch, but for the last. Where that would be less than half of it, the last two share their samples
    evenly; three samples are one step. The steps that follow any of these are those of the samples that are left then.
    """
    full, rest = divmod(num, global_size)
    if not rest:
        return [global_size] * full
    if not full or (rest > 1 and 2 * rest >= global_size):
        return [global_size] * full + [rest]
    both = global_size + rest
    last = [both] if both == 3 else [both - both // 2, both // 2]  # noqa: PLR2004  two would leave one alone
    return [global_size] * (full - 1) + last


def _cut(num: int, shares: tuple[int, ...]) -> list[int]:
    """Bounds of the slices of ``range(num)``, in proportion; the first slice is never empty if num >= 1."""
    total, bounds, seen = sum(shares), [0], 0
    for share in shares:
        seen += share
        bounds.append(-(-num * seen // total))
    return bounds


@functools.lru_cache(maxsize=8)  # the steps of an epoch are all of one size but the last two
def split_by_shares(
    num: int, shares: tuple[int, ...], batch_sizes: tuple[int, ...] | None = None, *, pairs: bool = False
) -> list[tuple[int, int]]:
    """Cut ``range(num)`` into one slice (start, end) per share, in proportion; the first is never empty if num >= 1.

    Args:
        num: of samples.
        shares: of the ranks.
        batch_sizes: what each rank takes at once; with them no slice has a single sample, but of a rank that never
            takes more, or where there is but one: pairs are dealt then, and one that is left over goes with the first.
        pairs: deal them in any case.
    """
    bounds = _cut(num, shares)
    lone = batch_sizes and any(b - a == 1 < size for (a, b), size in zip(pairwise(bounds), batch_sizes, strict=True))
    if pairs or lone:
        bounds = [0] + [2 * bound + num % 2 for bound in _cut(num // 2, shares)[1:]]
    return list(pairwise(bounds))


def _batch_sizes(share: int, size: int, *, pairs: bool, at_least: int = 1) -> list[int]:
    """Sizes of a rank's micro-batches of its share of a step: as few as its size allows, as even as can be.

    There is one at least. None is a single sample if the size is not one: of size two, an odd one goes with a pair.

    Args:
        share: its samples of the step.
        size: what it takes at once.
        pairs: whether only the first may be of an odd number, so that neighbours stay together.
        at_least: so many there are, of which some may be empty then, or of a single sample.
    """
    if not pairs or size == 1:
        fewest = -(-share // size)
        num = max(at_least, fewest if size == 1 else min(fewest, share // 2))
        return [share // num + (place < share % num) for place in range(num)]
    num = max(at_least, share // 2 if size // 2 == 1 else -(-((share + 1) // 2) // (size // 2)))
    sizes = [2 * (share // 2 // num + (place >= num - share // 2 % num)) for place in range(num)]
    return [sizes[0] + share % 2, *sizes[1:]]


@functools.lru_cache(maxsize=8)
def has_lone_sample(num: int, dealt: Batching, *, pairs: bool = False) -> bool:
    """Whether, in a step of ``num`` samples, some rank has a micro-batch of a single one."""
    slices = split_by_shares(num, dealt.shares, dealt.batch_sizes, pairs=pairs)
    shares = zip(slices, dealt.batch_sizes, strict=True)
    return any(1 in _batch_sizes(end - start, size, pairs=pairs) for (start, end), size in shares)


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How the samples of a step are spread over the ranks."""

    batch_sizes: tuple[int, ...]
    """What each rank takes through the model at once."""
    shares: tuple[int, ...]
    """In what proportion a step's samples are dealt to the ranks."""
    global_batch_size: int
    """Samples of an optimizer step over all ranks; an epoch's last two steps may have fewer."""

    @classmethod
    def even(cls, size: int, *, world_size: int, global_size: int | None, accumulate: int) -> Batching:
        """The same for every rank."""
        sizes = (size,) * world_size
        return cls(batch_sizes=sizes, shares=sizes, global_batch_size=global_size or sum(sizes) * accumulate)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one rank does for one optimizer step."""

    epoch: int
    """From 0."""
    offset: int
    """Where in the epoch's order this step begins."""
    end: int
    """Where the next one begins; beyond the last step it is the order's length."""
    num_samples: int
    """Samples of this step over all ranks: what the loss is averaged over."""
    micro_batches: tuple[tuple[int, ...], ...]
    """Sample indices of this rank, in the batches that go through the model at once; at least one, perhaps empty."""
    repeats: tuple[tuple[int, ...], ...] = ()
    """Of each how often the epoch had it before; empty: it has none twice."""
    lone: bool
    """Whether on any rank one of them is a single sample."""

    @property
    def positions(self) -> Iterator[list[tuple[int, int]]]:
        """What is loaded for each micro-batch, by (epoch, index).

        A sample that comes again in an epoch comes as of another one: it is augmented in another way.
        """
        for number, batch in enumerate(self.micro_batches):
            again = self.repeats[number] if self.repeats else (0,) * len(batch)
            yield [(self.epoch + (times << 32), index) for index, times in zip(batch, again, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The plan of all epochs for a data set and a set of ranks."""

    seed: int
    """The recipe's."""
    num_samples: int
    """Of the training set, with those that are left out: the length of an epoch's order."""
    batching: Batching
    """How the samples of a step are spread over the ranks."""
    excluded: frozenset[int] = frozenset()
    """Samples that keep their place in every order and are passed over there. So one more of them moves no position
    that a checkpoint holds, and no other sample to another place."""
    labels: tuple[int, ...] | None = None
    """Classes of the samples where each epoch sees them evenly (:mod:`launcher.engine.loading.balance`); None: each
    sample once."""
    pairs: bool = False
    """Whether neighbours of a step go together to one rank and micro-batch, where they are mixed."""
    together: bool = False
    """Whether all ranks take a step in as many micro-batches, as they wait for each other in each (SyncBatchNorm)."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch; about so many where classes are seen evenly and images are left out."""
        return len(step_sizes(self.num_samples - len(self.excluded), self.batching.global_batch_size))

    def steps(self, rank: int, *, epoch: int, offset: int, end_epoch: int) -> Iterator[Step]:
        """What ``rank`` does from a position up to ``end_epoch`` (excluded)."""
        dealt = self.batching
        for number in range(epoch, end_epoch):
            order, repeats = self._order(number)
            places = self._places(order, offset if number == epoch else 0)
            bounds = [0, *accumulate(step_sizes(len(places), dealt.global_batch_size))]
            for start, end in pairwise(bounds):
                chosen = places[start:end]
                following = places[end : end + 1].tolist()
                yield Step(
                    epoch=number,
                    offset=int(chosen[0]),
                    end=following[0] if following else self.num_samples,
                    num_samples=len(chosen),
                    micro_batches=self._micro_batches(order[chosen], rank),
                    repeats=() if repeats is None else self._micro_batches(repeats[chosen], rank),
                    lone=has_lone_sample(len(chosen), dealt, pairs=self.pairs),
                )

    def statistics_batches(self, rank: int, *, epoch: int, most: int) -> list[list[int]]:
        """A rank's part of the first ``most`` batches of an epoch, to compute BatchNorm's statistics from.

        All are of one size: what every rank that has batch statistics takes at once. They are the same at any world
        size, and every rank has as many (the last ones may be empty). There are none where there are no batch
        statistics.
        """
        (order, _), sizes = self._order(epoch), self.batching.batch_sizes
        used = order[self._places(order, 0)]
        size = min(min((one for one in sizes if one > 1), default=1), len(used))
        num = min(most, len(used) // size) if size > 1 else 0
        batches = used[: num * size].reshape(num, size).tolist() + [[]] * (-num % len(sizes))
        return batches[rank :: len(sizes)]

    def is_over(self, epoch: int, offset: int) -> bool:
        """Whether no sample of an epoch is left from a position on."""
        return not len(self._places(self._order(epoch)[0], offset))

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """The samples of an epoch, and how often each was in it before where that can be."""
        if self.labels is None:
            return epoch_order(self.seed, epoch, self.num_samples), None
        return balance.balanced_order(self.seed, epoch, self.labels)

    def _places(self, order: NDArray[np.int64], offset: int) -> NDArray[np.int64]:
        """Where in an epoch's order, from ``offset`` on, are samples that are not left out."""
        used = np.ones(self.num_samples, dtype=bool)
        used[list(self.excluded)] = False
        return offset + np.flatnonzero(used[order[offset:]])

    def _micro_batches(self, indices: NDArray[np.int64], rank: int) -> tuple[tuple[int, ...], ...]:
        dealt = self.batching
        slices = split_by_shares(len(indices), dealt.shares, dealt.batch_sizes, pairs=self.pairs)
        start, end = slices[rank]
        most = self._most_parts(slices) if self.together else 1
        bounds = [0, *accumulate(_batch_sizes(end - start, dealt.batch_sizes[rank], pairs=self.pairs, at_least=most))]
        return tuple(tuple(indices[start:end][a:b].tolist()) for a, b in pairwise(bounds))

    def _most_parts(self, slices: Sequence[tuple[int, int]]) -> int:
        """The micro-batches of the rank that needs the most of them."""
        both = zip(slices, self.batching.batch_sizes, strict=True)
        return max(len(_batch_sizes(end - start, size, pairs=self.pairs)) for (start, end), size in both)


def validation_batches(num_samples: int, *, rank: int, batching: Batching) -> list[list[int]]:
    """A rank's share of the validation set in batches: every sample on exactly one rank, nothing padded or dropped.

    Every rank gets the same number of batches (the last ones may be empty), so that all can agree to stop at one.

    Args:
        num_samples: of the validation set.
        rank: whose share.
        batching: what all ranks take.
    """
    slices, sizes = split_by_shares(num_samples, batching.shares), batching.batch_sizes
    num_batches = max(-(-(end - start) // size) for (start, end), size in zip(slices, sizes, strict=True))
    own, size = range(*slices[rank]), sizes[rank]
    return [list(own[i * size : (i + 1) * size]) for i in range(num_batches)]


def all_validation_batches(num_samples: int, batching: Batching, *, together: int = 1) -> list[list[int]]:
    """Those of every rank in turn, without empty ones.

    Args:
        num_samples: of the validation set.
        batching: what all ranks take.
        together: batches of a rank that are one here.
    """
    dealt = zip(split_by_shares(num_samples, batching.shares), batching.batch_sizes, strict=True)
    return [
        list(range(at, min(at + size * together, end)))
        for (start, end), size in dealt
        for at in range(start, end, size * together)
    ]
