"""Builds what a rank trains with, from the run directory alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.nn.parallel import DistributedDataParallel

from launcher import image_folder
from launcher import recipe as recipes
from launcher.engine import data, optim
from launcher.engine.distributed import broadcast_buffers
from launcher.engine.model import FineTunedModel, build_model, build_preprocessing
from launcher.engine.schedule import Schedule, validation_batches

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from torch.utils.data import DataLoader

    from launcher.engine.data import Batch, ImageDataset, Preprocessing
    from launcher.engine.device import Device, Precision
    from launcher.engine.distributed import Ranks
    from launcher.recipe import Recipe
    from launcher.run_dir import RunDir

DEBUG_STEPS = 5


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
    precision: Precision
    """Of the forward pass."""
    model: FineTunedModel
    """The network, on the device."""
    optimizer: torch.optim.Optimizer
    """Of all its parameters."""
    schedule: Schedule
    """Which samples form which step."""
    train_set: ImageDataset
    """Training images."""
    val_set: ImageDataset
    """Validation images."""
    preprocessing: Preprocessing
    """What is done to an image."""
    channels_last: bool
    """Memory layout of the images."""
    max_steps: int | None
    """Where debugging ends."""
    ddp: DistributedDataParallel = field(init=False)
    """The network as DDP wraps it; :meth:`wrap` makes it."""

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the logits; a head wider than the data set has outputs without a name."""
        known = self.train_set.classes
        return known + [f"unused-{i}" for i in range(len(known), num_classes(self.recipe, known))]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        total = self.schedule.steps_per_epoch * self.recipe.train.epochs
        return total if self.max_steps is None else min(total, self.max_steps)

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.run.run_id

    def wrap(self) -> None:
        """Have DDP average the gradients of what learns now. Every rank must, at the same point."""
        broadcast_buffers(self.model.module)  # DDP does so for parameters only, told as below
        options = inspect.signature(DistributedDataParallel).parameters
        # Rank 0's buffers are handed on before a validation, not at every step. torch 2.14 has a new name for that.
        per_step = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        self.ddp = DistributedDataParallel(
            self.model.module,
            device_ids=[self.device.index] if self.device.is_cuda else None,
            gradient_as_bucket_view=True,
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
        images, labels = batch
        if not len(labels):
            size = self.preprocessing.image_size
            images = images.new_zeros(0, 3, size, size)
        images = images.to(self.device.torch_device, non_blocking=True)
        images = self.preprocessing.normalize(images)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels.to(self.device.torch_device, non_blocking=True)

    def autocast(self) -> AbstractContextManager[None]:
        """Run the forward pass in the precision chosen."""
        return self.device.autocast(self.precision)

    def train_loader(self, epoch: int, offset: int) -> DataLoader[Batch]:
        """This rank's micro-batches from a position to the end; one set of loader processes for all."""
        steps = self.schedule.steps(self.ranks.rank, epoch=epoch, offset=offset, end_epoch=self.recipe.train.epochs)
        batches = ([(step.epoch, i) for i in batch] for step in steps for batch in step.micro_batches)
        return self._loader(self.train_set, batches)

    def val_loader(self) -> DataLoader[Batch]:
        """This rank's share of the validation set."""
        batches = validation_batches(
            len(self.val_set),
            rank=self.ranks.rank,
            batch_sizes=self.schedule.batch_sizes,
        )
        return self._loader(self.val_set, ([(0, i) for i in batch] for batch in islice(batches, self.max_steps)))

    def _loader(self, dataset: ImageDataset, batches: Iterator[list[tuple[int, int]]]) -> DataLoader[Batch]:
        debug = self.max_steps is not None  # breakpoints work in this process only
        workers = 0 if debug else data.num_loader_workers(self.recipe.data, self.ranks)
        return data.build_loader(dataset, batches, workers=workers, device=self.device)


def num_classes(recipe: Recipe, classes: list[str]) -> int:
    """Outputs of the head: the recipe's number, or one for each class folder."""
    return len(classes) if recipe.model.num_classes == "auto" else recipe.model.num_classes


def build_parts(run: RunDir, ranks: Ranks, device: Device, *, debug: bool = False) -> Parts:
    """Read the recipe of ``run`` and build everything a rank needs. Only :meth:`Parts.wrap` uses the process group."""
    recipe = recipes.read_resolved(run.recipe)
    folder = data.prepare(recipe.data)
    preprocessing = build_preprocessing(recipe.model, recipe.data)
    left_out = image_folder.read_quarantine(run.bad_images)
    train_set = data.ImageDataset(folder, "train", preprocessing.transform(recipe.data.augment), seed=recipe.seed)
    val_set = data.ImageDataset(folder, "val", preprocessing.transform(), seed=recipe.seed, left_out=left_out)
    channels_last = device.channels_last if recipe.train.channels_last == "auto" else recipe.train.channels_last
    model = build_model(
        recipe,
        num_classes=num_classes(recipe, train_set.classes),
        image_size=preprocessing.image_size,
        with_weights=ranks.rank == 0,
    )
    model.module.to(device.torch_device)
    if channels_last:
        model.module.to(memory_format=torch.channels_last)
    batch_sizes = (recipe.batch.size,) * ranks.world_size
    return Parts(
        recipe=recipe,
        run=run,
        ranks=ranks,
        device=device,
        precision=device.precision(recipe.precision),
        model=model,
        optimizer=optim.build_optimizer(model, recipe.optim),
        schedule=Schedule(
            seed=recipe.seed,
            num_samples=len(train_set),
            batch_sizes=batch_sizes,
            global_batch_size=recipe.batch.global_size or sum(batch_sizes) * recipe.batch.accumulate,
            excluded=train_set.find(left_out),
        ),
        train_set=train_set,
        val_set=val_set,
        preprocessing=preprocessing,
        channels_last=channels_last,
        max_steps=DEBUG_STEPS if debug else None,
    )
