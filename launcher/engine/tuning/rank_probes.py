"""Runs a rank's probes in child processes: its device, batch sizes, and the best split of its cores."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine import data
from launcher.engine.numerics import Preference
from launcher.engine.tuning import probe
from launcher.engine.tuning.child import call_in_child
from launcher.engine.tuning.host_split import gpu_workers, split_cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.engine.device import Device, Precision
    from launcher.engine.distributed import Ranks
    from launcher.engine.loading.data_sets import DataSets
    from launcher.engine.numerics import Numerics
    from launcher.engine.tuning.budget import Budget
    from launcher.engine.tuning.probe import Probe
    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir
    from launcher.system.memory import FreeMemory

PROBE_TIMEOUT_S = 180
FIRST_TIMEOUT_S = 900
"""The first probe loads CUDA's libraries, perhaps from a file system that is slow: that says nothing of its batch."""


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """The device to train on."""

    name: str
    """Its kind."""
    total_bytes: int
    """Its memory."""
    free: FreeMemory
    """Memory that this rank may use."""
    precision: Precision
    """What the recipe's comes to on it."""
    channels_last: bool | None = None
    """Likewise the memory layout; None: what suits the model."""


class RankProbes:
    """Leaves this process as it was: all is tried in children.

    Args:
        run: of which recipe.
        recipe: that recipe.
        ranks: who this is.
        device: not touched yet.
        data_sets: of the run.
        heed_stop: called again and again; when it raises, the child that runs is killed.
        say: takes a line for the user.
    """

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        ranks: Ranks,
        device: Device,
        data_sets: DataSets,
        *,
        heed_stop: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._recipe = recipe
        self._ranks = ranks
        self._device = device
        self._data_sets = data_sets
        self.say = say
        """Takes a line for the user."""
        self._heed_stop = heed_stop
        self._trained = run, device, data_sets
        self._timeout_s: float = FIRST_TIMEOUT_S
        self.budget: Budget | None = None
        """What they may take; None: they are not bounded."""
        self.numerics: Numerics | None = None
        """What the ranks have agreed on; None: what this device prefers."""

    def facts(self) -> DeviceFacts:
        """The device. A child asks a GPU, because this process must not touch it before it forks others."""

        def ask() -> DeviceFacts:
            self._device.activate()
            own = Preference.of(self._device, self._recipe, self._ranks)
            return DeviceFacts(
                name=own.device,
                total_bytes=self._device.total_memory(),
                free=self._device.free_memory(self._ranks.local_world_size),
                precision=own.precision,
                channels_last=own.channels_last,
            )

        found: DeviceFacts = self._call(ask) if self._device.is_cuda else ask()
        return found

    def measure(self, batch_size: int, beside: Probe | None) -> Probe:
        """See :func:`launcher.engine.tuning.probe.measure`."""
        try:
            options = {"beside": beside, "numerics": self.numerics, "budget": self.budget}
            found: Probe = self._call(probe.measure, *self._trained, batch_size, **options)
        finally:
            self._timeout_s = PROBE_TIMEOUT_S
        self.say(f"batch {batch_size}: {found.images_per_s:.0f} images/s, {found.memory_bytes / 1e9:.2f} GB")
        return found

    def compare(self, batch_sizes: Sequence[int]) -> list[Probe]:
        """See :func:`launcher.engine.tuning.probe.compare`."""
        found: list[Probe] = self._call(probe.compare, *self._trained, batch_sizes, numerics=self.numerics)
        self.say(f"in turn: {', '.join(f'batch {one.batch_size}: {one.images_per_s:.0f} images/s' for one in found)}")
        return found

    def split(self, batch_size: int, images_per_s: float, *, is_measured: bool = True) -> dict[str, int]:
        """Loader processes and threads of this rank, with the batch size that was found: ``{workers, threads}``."""
        if not is_measured:
            usual = data.num_loader_workers(self._recipe.data, self._ranks)
            return {"workers": usual, "threads": torch.get_num_threads()}
        recipe, threads, cores = self._recipe, torch.get_num_threads(), data.num_rank_cores(self._ranks)
        workers = None if recipe.data.workers == "auto" else recipe.data.workers
        fixed = recipe.launch.threads != "auto"
        if (workers is not None and (fixed or self._device.is_cuda)) or cores == 1:
            return {"workers": workers or 0, "threads": threads}
        load = self._call(probe.loading_speed, self._data_sets)
        if self._device.is_cuda:
            return {"workers": gpu_workers(train=images_per_s, load=load, cores=cores), "threads": threads}
        train = {threads: images_per_s}
        if threads > 1 and not fixed:
            counts = (threads, threads - 1)
            train = self._call(probe.compare_threads, *self._trained, batch_size, counts, numerics=self.numerics)
            self.say(", ".join(f"{count} threads: {speed:.0f} images/s" for count, speed in train.items()))
        return split_cpu(train=train, load=load, cores=cores, workers=workers)._asdict()

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        call = functools.partial(function, *arguments, **options)
        return call_in_child(call, timeout_s=self._timeout_s, heed_stop=self._heed_stop)
