"""Builds what a rank trains with, from the run directory alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from launcher.engine import data, numerics, optim
from launcher.engine.augmenting.mixing import is_mixing
from launcher.engine.distributed import are_everywhere_the_same, broadcast_buffers
from launcher.engine.loading.balance import SampleWeights, count_classes, weights_in_loss
from launcher.engine.loading.data_sets import full_classes, num_classes, open_data_sets
from launcher.engine.losses import Loss, build_loss
from launcher.engine.model import FineTunedModel, build_model
from launcher.engine.network.fitting import are_needed
from launcher.engine.network.sync_batchnorm import synchronise
from launcher.engine.schedule import Batching, Schedule, validation_batches
from launcher.recipe import load as recipes
from launcher.recipe import phases
from launcher.system import loader_room
from launcher.system.loader_room import Loading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from torch.utils.data import Dataset

    from launcher.engine.data import Preprocessing
    from launcher.engine.device import Device, Precision
    from launcher.engine.distributed import Ranks
    from launcher.engine.features.kept import Kept
    from launcher.engine.loading.data_sets import DataSets
    from launcher.engine.loading.handover import Batch, Batches, Loader
    from launcher.engine.loading.samples import Samples
    from launcher.engine.numerics import Numerics
    from launcher.recipe.schema import BatchConfig, Recipe
    from launcher.runs.run_dir import RunDir

DEBUG_STEPS, DEBUG_BATCH_SIZE = 5, 8
"""With ``--debug``: steps, and their batch size where the recipe leaves it to measurement, which takes a while."""


@dataclass(kw_only=True)
class Parts:
    """What a rank trains with."""

    recipe: Recipe
    """The run's."""
    run: RunDir
    """Where its files are."""
    ranks: Ranks
    """Who this process is."""
    device: Device
    """Where it computes."""
    numerics: Numerics
    """What a step is computed in."""
    model: FineTunedModel
    """The network, on the device."""
    loss: Loss
    """What it learns by."""
    optimizer: torch.optim.Optimizer
    """Of all its parameters."""
    schedule: Schedule
    """Which samples form which step."""
    train_set: Samples
    """Training images."""
    val_set: Samples
    """Validation images."""
    preprocessing: Preprocessing
    """What is done to an image."""
    loading: Loading
    """How many processes load images, and how far ahead."""
    max_steps: int | None
    """Where debugging ends."""
    weights: SampleWeights | None = None
    """What the loss of each training image counts; None: all the same."""
    ddp: DistributedDataParallel = field(init=False)
    """What steps compute as DDP wraps it; :meth:`wrap` makes it."""
    kept: Kept | None = field(init=False, default=None)
    """What steps take instead of images while the features of a frozen backbone are kept."""
    _between: Loader | None = field(init=False, default=None)
    """Of what is looked at between the steps."""

    @property
    def network(self) -> nn.Module:
        """What steps compute: the network, or what of it comes after kept features."""
        return self.kept.rest if self.kept else self.model.module

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the logits; a head wider than the data set has outputs without a name."""
        return full_classes(self.recipe, self.train_set.classes)

    @property
    def images_per_class(self) -> dict[str, int]:
        """Training images of each class that take part."""
        left_out = self.schedule.excluded
        labels = count_classes(self.train_set.labels, left_out)
        return {name: labels[index] for index, name in enumerate(self.train_set.classes)}

    def made_up_targets(self, num: int) -> torch.Tensor:
        """Targets as those of samples, for steps of which only the time is looked at."""
        classes = len(self.classes)
        if self.recipe.data.task == "multi_label":
            return torch.randint(0, 2, (num, classes)).float()
        return torch.randint(0, classes, (num,))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        total = self.schedule.steps_per_epoch * self.recipe.train.epochs
        return total if self.max_steps is None else min(total, self.max_steps)

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.run.run_id

    @property
    def precision(self) -> Precision:
        """Of the forward pass."""
        return self.numerics.precision

    def take(self, agreed: Numerics) -> None:
        """Compute in what the run's ranks have agreed on; for a probe, which is alone. Before the first step."""
        self.numerics = agreed = agreed.settle(self.model.module)
        layout = torch.channels_last if agreed.channels_last else torch.contiguous_format
        self.model.module.to(memory_format=layout)

    def enter(self, epoch: int) -> bool:
        """Have learn what learns in an epoch, as its phase says; return whether other gradients are exchanged now.

        What the optimizer knew of layers that do not learn is forgotten: it would be of long ago when they do again.
        """
        optim.regroup(self.optimizer, self.model, phases.phase_at(self.recipe, epoch).optim)
        changed = self.model.freeze(epoch)
        optim.forget_frozen(self.optimizer)
        return changed

    def wrap(self) -> None:
        """Have DDP average the gradients of what learns now. Every rank must, at the same point."""
        broadcast_buffers(self.model.module)  # DDP does so for parameters only, told as below
        options = inspect.signature(DistributedDataParallel).parameters
        # Rank 0's buffers are handed on before a validation, not at every step. torch 2.14 has a new name for that.
        per_step = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        # Weights that all ranks have made by the same seed, or read from a checkpoint, need not be handed on: on a CPU
        # that takes several times as long as to compare them, at every start.
        same = not self.device.is_cuda and are_everywhere_the_same(self.model.module.parameters())
        self.ddp = DistributedDataParallel(
            self.network,
            device_ids=[self.device.index] if self.device.is_cuda else None,
            gradient_as_bucket_view=True,
            init_sync=not same,
            **{per_step: False},  # type: ignore[arg-type]  # one of two names, both boolean
        )
        if not self.device.is_cuda:
            # DDP lays its buckets out anew after its first step, and with three ranks or more gloo adds a number up in
            # an order that depends on its place there: a resumed run would differ from an undisturbed one in the last
            # bits. Here it does so before the first step. On CUDA the order of the first backward pass is worth more.
            self.ddp.reducer._push_all_rebuilt_params()  # noqa: SLF001  as torch's Join does
            self.ddp.reducer._rebuild_buckets()  # noqa: SLF001

    def to_device(self, batch: Batch) -> Batch:
        """Normalised float images, N x 3 x S x S, and labels, on the rank's device."""
        images, labels = self.device.send(batch)()
        if not len(labels):
            size = self.preprocessing.image_size
            images = images.new_zeros(0, self.preprocessing.channels, size, size)
        images = self.preprocessing.normalize(images)
        if self.numerics.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def step_inputs(self, batch: Batch) -> Batch:
        """What :attr:`network` takes, and labels, on the rank's device."""
        return self.kept.to_device(batch) if self.kept else self.to_device(batch)

    def autocast(self) -> AbstractContextManager[None]:
        """Run the forward pass in the precision chosen."""
        return self.device.autocast(self.precision)

    def fit_loading(self) -> str | None:
        """Have no more loader processes than this machine has room for. Every rank must, before any of them loads.

        Returns:
            Why there are fewer than the recipe asks for, and what to do; None: there are not.
        """
        wanted, ranks = self.loading, self.ranks
        self.loading = loader_room.fit(
            wanted.workers,
            wanted.prefetch,
            batch_bytes=self.schedule.batching.batch_sizes[ranks.rank] * self.preprocessing.bytes_of_sample,
            room=loader_room.prepare(ranks.local_world_size, pinned=self.device.pin_memory),
        )
        if self.loading.why is None:
            return None
        fewer = f"{self.loading.workers} loader processes of {self.loading.prefetch} batches each"
        return f"rank {ranks.rank} takes {fewer} instead of {wanted.workers} of {wanted.prefetch}: {self.loading.why}"

    def train_loader(self, epoch: int, offset: int) -> Loader | Batches:
        """This rank's micro-batches from a position to the end; one set of loader processes for all, or none."""
        steps = self.schedule.steps(self.ranks.rank, epoch=epoch, offset=offset, end_epoch=self.recipe.train.epochs)
        if self.kept:
            return self.kept.batches([(step.epoch, i) for i in batch] for step in steps for batch in step.micro_batches)
        return self.loader(self.train_set, (batch for step in steps for batch in step.positions))

    def statistics_loader(self, epoch: int, batches: list[list[int]], kept: Kept | None) -> Loader | Batches:
        """Batches of training images as the epoch saw them; of their features where they are ``kept``."""
        of_kept = kept and kept.batches([(epoch, i) for i in batch] for batch in batches)
        return of_kept or self._between_steps([(True, epoch, i) for i in batch] for batch in batches)

    def val_loader(self, kept: Kept | None = None) -> Loader | Batches:
        """This rank's share of the validation set; of its features where they are ``kept``."""
        batches = validation_batches(
            len(self.val_set),
            rank=self.ranks.rank,
            batching=self.schedule.batching,
        )
        numbers = islice(batches, self.max_steps)
        if kept:
            return kept.batches([(0, i) for i in batch] for batch in numbers)
        return self._between_steps([(False, 0, i) for i in batch] for batch in numbers)

    def close_loaders(self) -> None:
        """End the loader processes that live through the training."""
        if self._between is not None:
            self._between.close()

    def _between_steps(self, batches: Iterator[list[tuple[bool, int, int]]]) -> Loader:
        """A loader whose processes live on: forking them anew takes time, and more of it the larger this process is."""
        if self._between is None:
            self._between = self.loader(data.BothSplits(self.train_set, self.val_set), batches, lives_on=True)
        self._between.source.batches = batches
        return self._between

    def loader(self, dataset: Dataset[Batch], batches: Iterator[list[Any]], *, lives_on: bool = False) -> Loader:
        """Of these batches of (epoch, index) of a split, or as the data set takes them."""
        loading, device = self.loading, self.device
        return data.build_loader(
            dataset, batches, workers=loading.workers, prefetch=loading.prefetch, device=device, lives_on=lives_on
        )


def full_world_size(run: RunDir) -> int:
    """Ranks that the samples of a step are for in a run that shrinks and grows; 0: those that there are."""
    plan = run.read_plan()
    return plan.world_size if plan.is_elastic else 0


def fixed_batching(config: BatchConfig, ranks: Ranks, *, full_size: int = 0, debug: bool) -> Batching:
    """That of a recipe which names the batch size, or is debugged.

    Args:
        config: of the recipe.
        ranks: who this process is.
        full_size: of :func:`full_world_size`.
        debug: a handful of steps.
    """
    assert config.size != "auto" or debug, "the ranks have to agree on it first"  # noqa: S101
    size = DEBUG_BATCH_SIZE if config.size == "auto" else config.size
    return Batching.even(
        size,
        world_size=ranks.world_size,
        global_size=config.global_size or size * config.accumulate * (full_size or ranks.world_size),
        accumulate=config.accumulate,
    )


def _schedule(
    recipe: Recipe, images: DataSets, dealt: Batching, excluded: frozenset[int], *, together: bool
) -> Schedule:
    return Schedule(
        seed=recipe.seed,
        num_samples=len(images.train),
        batching=dealt,
        excluded=excluded,
        labels=images.train.labels if recipe.data.balance == "sampler" else None,
        pairs=is_mixing(recipe.data),
        together=together,
    )


def build_parts(
    run: RunDir,
    ranks: Ranks,
    device: Device,
    *,
    data_sets: DataSets | None = None,
    batching: Batching | None = None,
    loader_workers: int | None = None,
    with_weights: bool | None = None,
    debug: bool = False,
) -> Parts:
    """Build everything a rank needs. Every rank must, at the same point: they agree on what they compute in.

    Args:
        run: its recipe says what.
        ranks: who this process is.
        device: where it computes.
        data_sets: of the run; None: list the images now.
        batching: how samples are spread over the ranks; None: as the recipe says.
        loader_workers: as was measured; None: as the recipe says.
        with_weights: read the starting weights; None: on rank 0, which hands them on.
        debug: a handful of steps.
    """
    recipe = recipes.read_resolved(run.recipe)
    agreed = numerics.agree(device, recipe, ranks)
    images = data_sets or open_data_sets(run)
    classes = num_classes(recipe, images.train.classes)
    model = build_model(
        recipe,
        num_classes=classes,
        image_size=images.preprocessing.image_size,
        with_weights=ranks.rank == 0 and are_needed(recipe.model, run) if with_weights is None else with_weights,
        classes=full_classes(recipe, images.train.classes),
    )
    together = recipe.model.sync_batchnorm and ranks.world_size > 1 and synchronise(model.module)
    dealt = batching or fixed_batching(recipe.batch, ranks, full_size=full_world_size(run), debug=debug)
    excluded, given, weights = images.train.find(images.left_out), images.train.weights, None
    if recipe.data.balance == "weights":
        several = recipe.data.task == "multi_label"
        weights = weights_in_loss(images.train.labels, excluded, num_classes=classes, several=several, given=given)
    schedule = _schedule(recipe, images, dealt, excluded, together=together)
    workers = data.num_loader_workers(recipe.data, ranks) if loader_workers is None else loader_workers
    return Parts(
        recipe=recipe,
        run=run,
        ranks=ranks,
        device=device,
        numerics=agreed.place(model.module, device),
        model=model,
        loss=build_loss(recipe.train, num_classes=classes, device=device.torch_device, weights=weights),
        optimizer=optim.build_optimizer(model, phases.phase_at(recipe, 0).optim),
        schedule=schedule,
        train_set=images.train,
        val_set=images.val,
        preprocessing=images.preprocessing,
        # Breakpoints work in this process only.
        loading=Loading(workers=0 if debug else workers, prefetch=data.num_ahead(workers)),
        max_steps=DEBUG_STEPS if debug else None,
        weights=SampleWeights(given, excluded, device, evenly=schedule.labels) if given else None,
    )
