"""The features of one split: computed by all ranks together, and handed out in batches."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from launcher.engine.device import is_out_of_memory
from launcher.engine.distributed import sum_over_ranks
from launcher.engine.loading.handover import Batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from launcher.engine.features.cut import Cut, Rest
    from launcher.engine.loading.handover import Batch
    from launcher.engine.loading.samples import Samples
    from launcher.engine.setup import Parts

MOST_AT_ONCE = 32
"""Images that go through the frozen part at once. Who computes them changes nothing, at any number of ranks."""


class Kept:
    """What steps or validations take instead of images. Every rank has one.

    Args:
        parts: what is trained.
        samples: the split.
        cut: of the network, in the mode that the split is seen in.
        table: views x samples x features, shared by the node's ranks.
        place: where that is, in words.
    """

    def __init__(self, parts: Parts, samples: Samples, cut: Cut, table: torch.Tensor, place: str) -> None:
        self._parts = parts
        self._samples = samples
        self._cut = cut
        self._table = table
        self.place = place
        self._labels = torch.tensor([label for _, label in samples.samples])
        self._filled: set[int] = set()

    @property
    def rest(self) -> Rest:
        """The part of the network that features go through."""
        return self._cut.rest

    @property
    def num_views(self) -> int:
        """How many views of an image there are; epoch e takes view e, and after the last the first again."""
        return len(self._table)

    @property
    def num_bytes(self) -> int:
        """What all of them take on a node."""
        return self._table.nbytes

    def has(self, epoch: int) -> bool:
        """Whether the view of an epoch is there."""
        return epoch % self.num_views in self._filled

    def batches(self, batches: Iterable[Sequence[tuple[int, int]]]) -> Batches:
        """The features and labels of these batches of (epoch, index)."""
        return Batches(map(self._gather, batches))

    def to_device(self, batch: Batch) -> Batch:
        """A batch on the rank's device."""
        device = self._parts.device
        features, labels = (part.pin_memory() if device.pin_memory else part for part in batch)
        return tuple(part.to(device.torch_device, non_blocking=True) for part in (features, labels))  # type: ignore[return-value]

    def _gather(self, positions: Sequence[tuple[int, int]]) -> Batch:
        indices = torch.tensor([index for _, index in positions], dtype=torch.int64)
        view = positions[0][0] % self.num_views if positions else 0
        return self._table[view].index_select(0, indices), self._labels.index_select(0, indices)

    @torch.no_grad()
    def fill(
        self, epoch: int, excluded: frozenset[int], *, stop: Callable[[], bool], poll: Callable[..., None]
    ) -> tuple[int, float]:
        """Compute the view of an epoch. Every rank must, at the same point, in the mode that the cut was made in.

        Args:
            epoch: whose random transforms it has.
            excluded: samples that are left out.
            stop: whether this rank was asked to stop.
            poll: called before each batch; may raise on all ranks, and the view is computed anew then.

        Returns:
            How many images, and the seconds.
        """
        parts, view, began = self._parts, epoch % self.num_views, time.monotonic()
        used = [index for index in range(len(self._samples)) if index not in excluded]
        size = min(MOST_AT_ONCE, *parts.schedule.batching.batch_sizes)
        chunks = [used[start : start + size] for start in range(0, len(used), size)]
        chunks += [[]] * (-len(chunks) % parts.ranks.world_size)  # all have as many, so that all can agree to stop
        own = chunks[parts.ranks.rank :: parts.ranks.world_size]
        loaded = iter(parts.loader(self._samples, ([(view, index) for index in chunk] for chunk in own)))
        for number in range(len(own)):
            batch = loaded.get(stop)
            poll()
            features = self._table.new_empty(0, self._table.shape[-1], device=parts.device.torch_device)
            if batch is not None and len(batch[1]):  # None: stopped, which all hear of at the next poll
                features = self._compute(parts.to_device(batch)[0])
            together = chunks[number * parts.ranks.world_size :][: parts.ranks.world_size]
            for indices, rows in self._exchange(together, features, size):
                if len(rows) == len(indices):
                    self._table[view, indices] = rows.to(self._table.device)
        poll(asked=False)  # what ranks said at their last batch must reach all
        sum_over_ranks(torch.zeros(1, device=parts.device.torch_device)).item()  # all have written
        self._filled.add(view)
        return len(used), time.monotonic() - began

    def _compute(self, images: torch.Tensor) -> torch.Tensor:
        """The features of images, of fewer at once where memory runs out."""
        try:
            with self._parts.autocast():
                features: torch.Tensor = self._cut.front(images)
                return features
        except Exception as error:
            if not is_out_of_memory(error) or len(images) == 1:
                raise
        self._parts.device.release_memory()
        return torch.cat([self._compute(half) for half in images.chunk(2)])

    def _exchange(
        self, chunks: Sequence[Sequence[int]], own: torch.Tensor, size: int
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Sample indices and features that this rank is to write: its own, or its part of all ranks' on its node."""
        ranks = self._parts.ranks
        if ranks.world_size == ranks.local_world_size:
            yield chunks[ranks.rank], own
            return
        padded = own.new_zeros(size, own.shape[1])
        padded[: len(own)] = own
        every = [torch.empty_like(padded) for _ in chunks]
        dist.all_gather(every, padded)
        for rank in range(ranks.local_rank, ranks.world_size, ranks.local_world_size):
            yield chunks[rank], every[rank][: len(chunks[rank])]
