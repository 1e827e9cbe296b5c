"""The counts over the validation set: every image once, whatever the batches."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine import distributed
from launcher.engine.schedule import split_by_shares
from launcher.engine.validating.build import build_totals, build_user_metrics
from launcher.engine.validating.examples import Examples
from launcher.engine.validating.forward import logits_of
from launcher.system import phases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from launcher.engine.features.kept import Kept
    from launcher.engine.loading.handover import Batch, Batches, Loader
    from launcher.engine.setup import Parts
    from launcher.engine.validating.build import Totals
    from launcher.engine.validating.noise import Answers


class Validation:
    """Validates on one rank. Nothing is kept for a backward pass, so larger batches than those of training fit.

    Args:
        parts: model, data and who we are.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._user_metrics = build_user_metrics(parts.recipe, len(parts.classes), parts.device.torch_device)
        self._network: nn.Module = parts.model.module
        self._answers: list[Answers] = []
        self._examples = Examples(parts)

    @torch.no_grad()
    def run(
        self,
        keep: Callable[[], Kept | None],
        *,
        stop: Callable[[], bool],
        poll: Callable[..., None],
        load: Callable[[Kept | None], Loader | Batches] | None = None,
        test_images: int | None = None,
    ) -> dict[str, Any]:
        """Counts over the whole validation set, the same on every rank. Every rank must call it.

        Args:
            keep: the features of the set, where they are kept; called in evaluation mode.
            stop: whether this rank was asked to stop.
            poll: where all ranks learn whether to stop; called with each batch that was loaded.
            load: this rank's share; None: of the validation set.
            test_images: how many there are in another set; None: it is the validation set.
        """
        parts = self._parts
        distributed.broadcast_buffers(parts.model.module)
        parts.model.eval()
        to = parts.device.torch_device
        shown = () if test_images is not None else self._examples.places.values()
        totals = build_totals(parts.recipe, parts.classes, to, parts.loss, self._user_metrics, shown)
        kept = keep()
        self._network = kept.rest if kept else parts.model.module
        loaded = iter((load or parts.val_loader)(kept))
        held: list[Batch] = []
        with self._told(test_images) as seen:
            while True:
                try:
                    batch = loaded.get(stop)
                except StopIteration:
                    break
                poll()
                if batch is None:
                    continue  # to where all learn that this rank stops
                seen(len(batch[1]))
                if len(batch[1]):
                    held.append((kept or parts).to_device(batch))
                if len(held) == parts.device.batches_in_validation:
                    self._count(held, totals)
            self._count(held, totals)
            poll(asked=False)  # what ranks said at their last batch must reach all before they add up
            found = totals.compute()
        del self._answers[:-1]  # those of the weights before the average's; others were never taken
        self._answers.append(totals.answers(parts.schedule.batching, found["samples"]))
        return found if test_images is not None else found | {"examples": self._examples.rows(self._answers[-1])}

    @contextlib.contextmanager
    def _told(self, test_images: int | None) -> Iterator[Callable[[int], None]]:
        """Tell people what is being done; gives what takes how many more images were seen."""
        parts, seen = self._parts, 0
        start, end = split_by_shares(test_images or len(parts.val_set), parts.schedule.batching.shares)[
            parts.ranks.rank
        ]
        doing = "validating" if test_images is None else "measuring the test set"
        share = f", rank {parts.ranks.rank}'s images" if parts.ranks.world_size > 1 else ""
        with phases.during(f"{doing}{share}") as show:

            def add(num: int) -> None:
                nonlocal seen
                seen += num
                show(seen, end - start)

            yield add

    def take_answers(self) -> list[Answers]:
        """Those of the validations since the last call, oldest first."""
        found, self._answers = self._answers, []
        return found

    def _count(self, held: list[Batch], totals: Totals) -> None:
        """Take what is held through the model, in one go where there is the memory, and hold it no longer."""
        if not held:
            return
        images, labels = (torch.cat(parts) if len(held) > 1 else parts[0] for parts in zip(*held, strict=True))
        held.clear()
        totals.add(logits_of(self._network, images, self._parts.device, self._parts.precision), labels)
