"""The test set (``data.test``): measured once, when training is over, by the best checkpoint."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from launcher.engine import data
from launcher.engine.checkpoints import checkpoint
from launcher.engine.network.fitting import load_state
from launcher.engine.schedule import validation_batches
from launcher.images.folder import read_quarantine
from launcher.images.listing import TEST

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.engine.listeners.recorder import Recorder
    from launcher.engine.loading.handover import Loader
    from launcher.engine.setup import Parts
    from launcher.engine.validating.validation import Validation


def measure(
    parts: Parts,
    best: dict[str, Any],
    validation: Validation,
    recorder: Recorder | None,
    *,
    stop: Callable[[], bool],
    poll: Callable[..., None],
) -> None:
    """Measure it, unless that was done with this checkpoint. Every rank must, at the same point.

    The model has the weights of the best checkpoint from then on.

    Args:
        parts: of a training that is over, and its checkpoints written.
        best: where the best checkpoint is, as :attr:`BestMetric.best` says.
        validation: of the run.
        recorder: on rank 0.
        stop: whether this rank was asked to stop.
        poll: as of the trainer.
    """
    split = parts.recipe.data.test
    assert split  # noqa: S101
    known = [recorder is not None and recorder.has_tested(split, best)]
    dist.broadcast_object_list(known, src=0)
    if known[0]:
        return
    loaded = checkpoint.load(parts.run.checkpoint(best["step"]))
    load_state(parts.model.module, loaded.best_weights)
    samples = data.open_split(
        parts.recipe,
        split if parts.recipe.data.dataset else TEST,
        parts.preprocessing,
        left_out=read_quarantine(parts.run.bad_images),
        classes=parts.train_set.classes,
    )
    numbers = validation_batches(len(samples), rank=parts.ranks.rank, batching=parts.schedule.batching)

    def load(_: object) -> Loader:
        return parts.loader(samples, ([(0, i) for i in batch] for batch in islice(numbers, parts.max_steps)))

    values = validation.run(lambda: None, stop=stop, poll=poll, load=load, test_images=len(samples))
    if recorder:
        recorder.tested(split, best, values)
