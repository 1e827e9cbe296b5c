"""The state of training, in one place: all that changes while a model trains, and that a checkpoint therefore holds."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

from launcher.engine import optim
from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.checkpoints.host_copies import HostCopies
from launcher.engine.metrics import BestMetric, TrainTotals
from launcher.engine.network.fitting import load_state
from launcher.engine.non_finite import NonFiniteMonitor
from launcher.engine.optimizing.averaging import WeightAverage
from launcher.errors import UsageError
from launcher.recipe import load as recipes
from launcher.recipe import metrics as recipe_metrics
from launcher.recipe import phases

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.engine.checkpoints.checkpoint import Checkpoint
    from launcher.engine.loading.samples import Samples
    from launcher.engine.setup import Parts
    from launcher.runs.run_dir import RunDir

Outcome = Literal["completed", "early_stopped", "preempted"]
"""How training ended."""


class TrainingState:
    """Everything that a step changes, besides the weights, buffers and optimizer of ``parts``, which belong to it.

    What else changes follows from it: layers are frozen as the epoch says, learning rates are set before each step, and
    random numbers are seeded by (seed, epoch, sample) and (seed, step, rank, micro-batch). A test walks through the
    trainer and fails when it meets a change that is of neither kind.

    Args:
        parts: what is trained.
        device_bytes: how much memory each rank's device has, in all.
    """

    def __init__(self, parts: Parts, device_bytes: Sequence[int] = ()) -> None:
        self._parts = parts
        self._device_bytes = list(device_bytes)
        device, stop = parts.device, parts.recipe.train.early_stopping
        measure = recipe_metrics.measure(parts.recipe, stop.metric)
        self.step = 0
        """Optimizer steps done."""
        self.epoch = 0
        """The one under way, from 0."""
        self.offset = 0
        """Where in its order the next step begins."""
        self.skipped: list[int] = []
        """Steps that are left out since training went back because of them (train.on_nan)."""
        self.batch_limits: list[int] | None = None
        """What each rank can take at once, since memory ran out on one of them."""
        self.best = BestMetric(
            metric=stop.metric, mode=stop.mode, min_delta=stop.min_delta, patience=stop.patience, measure=measure
        )
        self.scaler = device.grad_scaler(parts.precision)
        self.average = WeightAverage(parts.model.module, parts.recipe.train.ema, parts.recipe.train.swa)
        self.numbers = NonFiniteMonitor(device, scaled=self.scaler.is_enabled())
        self.epoch_totals = TrainTotals(device.torch_device)
        self.window_totals = TrainTotals(device.torch_device)
        self._copies = HostCopies()

    def capture(self) -> Checkpoint | None:
        """On rank 0 a copy on the host, which is under way until :meth:`finish_capture`.

        Every rank must call it: sums over steps are added up over the ranks.
        """
        parts = self._parts
        sums = {"epoch_sums": list(self.epoch_totals.reduce()), "window_sums": list(self.window_totals.reduce())}
        if parts.ranks.rank != 0:
            return None
        optimizer = {"optimizer": optim.saved(parts.optimizer), "scaler": self.scaler.state_dict()}
        state: dict[str, Any] = {
            "run_id": parts.run_id,
            "step": self.step,
            "epoch": self.epoch,
            "offset": self.offset,
            "skipped": self.skipped,
            "batch_limits": self.batch_limits,
            "device": parts.device.type,
            "device_bytes": self._device_bytes,
            "world_size": parts.ranks.world_size,
            **parts.numerics.saved(),
            "batching": asdict(parts.schedule.batching),
            "early_stopping": self.best.state(),
            "numbers": self.numbers.state(),
            "averaged": self.average.num,
            "classes": list(parts.classes),
            "train_set": parts.train_set.digest,
            "recipe": recipes.to_dict(parts.recipe),
            **sums,
        }
        model = parts.model.module.state_dict()
        named = parts.model.module.named_buffers(remove_duplicate=False)
        # A forward pass changes buffers: BatchNorm's statistics. They are few, and copied now.
        buffers = {name: model.pop(name) for name, _ in named if name in model}
        buffers = self._copies.copy(buffers)
        (model, optimizer, average), arrived = self._copies.copy_later([model, optimizer, self.average.saved()])
        return checkpoints.Checkpoint(
            step=self.step, model=model | buffers, average=average, optimizer=optimizer, state=state, arrived=arrived
        )

    def finish_capture(self) -> None:
        """From here on weights and optimizer may change."""
        self._copies.finish()

    def release(self, checkpoint: Checkpoint) -> None:
        """What :meth:`capture` gave is not needed any more."""
        checkpoint.arrived()
        self._copies.give_back([checkpoint.model, checkpoint.average, checkpoint.optimizer])

    def limit_batches(self, limits: list[int]) -> None:
        """Let no rank take more at once than this; accumulation fills in."""
        schedule = self._parts.schedule
        sizes = tuple(map(min, schedule.batching.batch_sizes, limits))
        self._parts.schedule = replace(schedule, batching=replace(schedule.batching, batch_sizes=sizes))
        self.batch_limits = list(limits)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from what :meth:`capture` gave, at the same world size or another.

        Learning rates and all else that the recipe says are this recipe's; only what training itself changed is the
        checkpoint's. The global batch is the checkpoint's unless the recipe names one; accumulation fills in what the
        ranks do not hold at once. So every step has the samples that it would have had. What the ranks could take at
        once holds for such devices only.

        Raises:
            UsageError: the training images are not those of the checkpoint.
        """
        parts, state = self._parts, checkpoint.state
        self.finish_capture()
        if parts.ranks.rank == 0:
            check_train_set(parts.run, parts.train_set, state)
        load_state(parts.model.module, checkpoint.model)
        self.average.restore(checkpoint.average, state.get("averaged", 0), state["epoch"])
        optim.regroup(parts.optimizer, parts.model, phases.phase_at(parts.recipe, state["epoch"]).optim)
        optim.restore(parts.optimizer, parts.model, checkpoint.optimizer["optimizer"])
        self.scaler = parts.device.grad_scaler(parts.precision)
        if checkpoint.optimizer["scaler"]:  # empty where the precision of then needed none: the scale begins anew
            self.scaler.load_state_dict(checkpoint.optimizer["scaler"])  # left aside where that of now needs none
        if parts.recipe.batch.global_size is None:
            kept = state["batching"]["global_batch_size"]
            parts.schedule = replace(parts.schedule, batching=replace(parts.schedule.batching, global_batch_size=kept))
        self.best.restore(state["early_stopping"])
        self.numbers.restore(state["numbers"])
        self.step, self.epoch, self.offset = state["step"], state["epoch"], state["offset"]
        self.skipped = list(state["skipped"])
        limits = limits_here(state["batch_limits"], state["device_bytes"], self._device_bytes)
        if limits:
            self.limit_batches(limits)
        for totals, sums in ((self.epoch_totals, "epoch_sums"), (self.window_totals, "window_sums")):
            totals.reset()
            if parts.ranks.rank == 0:
                totals.restore(state[sums])


def limits_here(limits: list[int] | None, then: Sequence[int], now: Sequence[int]) -> list[int] | None:
    """What each rank can take at once, by what those of an attempt before could on devices with as much memory.

    Args:
        limits: of the ranks then; None: there were none.
        then: memory of each one's device.
        now: that of the ranks that there are now.

    Returns:
        None where any of them has a device that none had then.
    """
    if limits is None or list(then) == list(now):
        return limits
    least = {size: min(limit for limit, of in zip(limits, then, strict=True) if of == size) for size in then}
    return [least[size] for size in now] if least.keys() >= set(now) else None


def check_train_set(run: RunDir, train_set: Samples, state: dict[str, Any]) -> None:
    """A position in an epoch's order means nothing for another set of images.

    Raises:
        UsageError: the training images are not those of the checkpoint whose ``state.json`` this is.
    """
    if train_set.digest == state["train_set"]:
        return
    anew = f"begin a new run from these weights: model.weights={run.checkpoint(state['step']) / checkpoints.MODEL}"
    if train_set.digest_of_images == state["train_set"]:
        raise UsageError(
            "the training images are those that the run began with, but their list has a column of weights now: it had "
            "none, or a version of launch began the run that did not record them. Resume without it, "
            f"'data.columns={{weight: none}}', or {anew}"
        )
    raise UsageError(
        f"the training images are not those that the run began with (now {len(train_set)}): images "
        f"were added, removed, renamed, moved to another class or given another weight. Undo that and resume, or {anew}"
    )
