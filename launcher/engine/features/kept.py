"""The features of one split, handed out in batches instead of its images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from launcher.engine.loading.handover import Batches

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from launcher.engine.device import Device
    from launcher.engine.features.cut import Cut, Rest
    from launcher.engine.loading.handover import Batch
    from launcher.engine.loading.samples import Samples


class Kept:
    """What steps or validations take instead of images. Every rank has one.

    Args:
        samples: the split.
        cut: of the network, in the mode that the split is seen in.
        table: views x samples x features, shared by the node's ranks.
        place: where that is, in words.
        device: of this rank.
    """

    def __init__(self, samples: Samples, cut: Cut, table: torch.Tensor, place: str, device: Device) -> None:
        self.samples = samples
        self.cut = cut
        self.table = table
        self.place = place
        self.filled: set[int] = set()
        """Views that are there."""
        self._device = device
        self._labels = torch.stack([samples.target(index) for index in range(len(samples))])

    @property
    def rest(self) -> Rest:
        """The part of the network that features go through."""
        return self.cut.rest

    @property
    def num_views(self) -> int:
        """How many views of an image there are."""
        return len(self.table)

    @property
    def num_bytes(self) -> int:
        """What all of them take on a node."""
        return self.table.nbytes

    def view_of(self, epoch: int) -> int:
        """Epoch e takes view e, and after the last the first again: a function of nothing else."""
        return epoch % self.num_views

    def batches(self, batches: Iterable[Sequence[tuple[int, int]]]) -> Batches:
        """The features and labels of these batches of (epoch, index)."""
        return Batches(map(self._gather, batches))

    def to_device(self, batch: Batch) -> Batch:
        """A batch on the rank's device."""
        return self._device.send(batch)()

    def _gather(self, positions: Sequence[tuple[int, int]]) -> Batch:
        indices = torch.tensor([index for _, index in positions], dtype=torch.int64)
        view = self.view_of(positions[0][0]) if positions else 0
        return self.table[view].index_select(0, indices), self._labels.index_select(0, indices)
