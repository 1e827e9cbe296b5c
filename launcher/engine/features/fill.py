"""Computes the features of a split: all ranks together, each image on one of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from launcher.engine.device import is_out_of_memory
from launcher.engine.distributed import sum_over_ranks
from launcher.system import phases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from launcher.engine.features.kept import Kept
    from launcher.engine.setup import Parts

MOST_AT_ONCE = 32
"""Images that go through the frozen part at once. They are the same at any number of ranks, and so are the features."""


@torch.no_grad()
def fill(
    parts: Parts,
    kept: Kept,
    epoch: int,
    excluded: frozenset[int],
    *,
    stop: Callable[[], bool],
    poll: Callable[..., None],
) -> tuple[int, float]:
    """Compute the view of an epoch. Every rank must, at the same point, in the mode that the cut was made in.

    Args:
        parts: what is trained.
        kept: where to.
        epoch: whose random transforms the view has, if it is among the first ones.
        excluded: samples that are left out.
        stop: whether this rank was asked to stop.
        poll: called before each batch; may raise on all ranks, and the view is computed anew then.

    Returns:
        How many images, and the seconds.
    """
    view, ranks, began = kept.view_of(epoch), parts.ranks, time.monotonic()
    used = [index for index in range(len(kept.samples)) if index not in excluded]
    size = min(MOST_AT_ONCE, *parts.schedule.batching.batch_sizes)
    chunks = [used[start : start + size] for start in range(0, len(used), size)]
    chunks += [[]] * (-len(chunks) % ranks.world_size)  # all have as many, so that all can agree to stop
    own = chunks[ranks.rank :: ranks.world_size]
    loaded = iter(parts.loader(kept.samples, ([(view, index) for index in chunk] for chunk in own)))
    with phases.during("computing the frozen layers' features, batch") as show:
        for number in range(len(own)):
            batch = loaded.get(stop)
            poll()
            show(number + 1, len(own))
            features = kept.table.new_empty(0, kept.table.shape[-1], device=parts.device.torch_device)
            if batch is not None and len(batch[1]):  # None: stopped, which all hear of at the next poll
                features = _compute(parts, kept, parts.to_device(batch)[0])
            together = chunks[number * ranks.world_size :][: ranks.world_size]
            for indices, rows in _exchange(parts, together, features, size):
                if len(rows) == len(indices):
                    kept.table[view, indices] = rows.to(kept.table.device)
    poll(asked=False)  # what ranks said at their last batch must reach all
    sum_over_ranks(torch.zeros(1, device=parts.device.torch_device)).item()  # all have written
    kept.filled.add(view)
    return len(used), time.monotonic() - began


def _compute(parts: Parts, kept: Kept, images: torch.Tensor) -> torch.Tensor:
    """The features of images, of fewer at once where memory runs out."""
    try:
        with parts.autocast():
            features: torch.Tensor = kept.cut.front(images)
            return features
    except Exception as error:
        if not is_out_of_memory(error) or len(images) == 1:
            raise
    parts.device.release_memory()
    return torch.cat([_compute(parts, kept, half) for half in images.chunk(2)])


def _exchange(
    parts: Parts, chunks: Sequence[Sequence[int]], own: torch.Tensor, size: int
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """Sample indices and features that this rank is to write: its own, or its part of all ranks' on its node."""
    ranks = parts.ranks
    if ranks.world_size == ranks.local_world_size:
        yield chunks[ranks.rank], own
        return
    padded = own.new_zeros(size, own.shape[1])
    padded[: len(own)] = own
    every = [torch.empty_like(padded) for _ in chunks]
    dist.all_gather(every, padded)
    for rank in range(ranks.local_rank, ranks.world_size, ranks.local_world_size):
        yield chunks[rank], every[rank][: len(chunks[rank])]
