"""What a step is computed in. The devices of a run may prefer different things; all ranks take what all of them can.

An A100 prefers bf16, a V100 has none. Were each to follow its own device, scaled gradients would be averaged with
unscaled ones, and only some ranks would enter the collectives of loss scaling. DDP refuses weights whose memory layout
differs between ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.engine.layers import prefers_channels_last
from launcher.runs.run_dir import node_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from launcher.engine.device import Device, Precision
    from launcher.engine.distributed import Ranks
    from launcher.recipe.schema import Recipe

BY_DEMAND: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
"""From what every device computes in to what the fewest do: a GPU that prefers bf16 has fp16 as well."""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What a step is computed in."""

    precision: Precision
    """Of the forward pass."""
    channels_last: bool | None
    """Memory layout of images and convolutions: NHWC. None: what suits the model, see :meth:`settle`."""
    why: str = ""
    """Which rank keeps the others from what they prefer; empty: none does."""

    def settle(self, module: nn.Module) -> Numerics:
        """With the layout that suits the model, where no rank asks for one; it is the same on every rank."""
        return replace(self, channels_last=prefers_channels_last(module)) if self.channels_last is None else self

    def changed_since(self, state: dict[str, Any]) -> dict[str, list[Any]]:
        """What was another when ``state.json`` was written: ``{name: [then, now]}``."""
        now = self.saved()
        return {name: [state[name], now[name]] for name in now if name in state and state[name] != now[name]}

    def place(self, module: nn.Module, device: Device) -> Numerics:
        """Move a model to its device, in the memory layout that is agreed or that suits it; return these, settled."""
        module.to(device.torch_device)
        settled = self.settle(module)
        if settled.channels_last:
            module.to(memory_format=torch.channels_last)
        return settled

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"precision": self.precision, "channels_last": self.channels_last}


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What a rank would take if it were alone."""

    rank: int
    host: str
    device: str
    """Its name."""
    precision: Precision
    channels_last: bool | None

    @classmethod
    def of(cls, device: Device, recipe: Recipe, ranks: Ranks) -> Preference:
        """By the recipe, and where that says ``auto`` by the device, which this process must be allowed to touch."""
        layout = recipe.train.channels_last
        return cls(
            rank=ranks.rank,
            host=node_name(),
            device=device.name,
            precision=device.precision(recipe.precision),
            channels_last=device.channels_last if layout == "auto" else layout,
        )


def common(preferences: Sequence[Preference]) -> Numerics:
    """The best that all can compute in, the same whoever asks."""
    least = min(preferences, key=lambda one: BY_DEMAND.index(one.precision))
    alike = all(one.precision == least.precision for one in preferences)
    layouts = {one.channels_last for one in preferences}
    return Numerics(
        precision=least.precision,
        channels_last=None if layouts == {None} else False not in layouts,
        why="" if alike else f"the best that rank {least.rank} on {least.host} has ({least.device})",
    )


def agree(device: Device, recipe: Recipe, ranks: Ranks) -> Numerics:
    """What all ranks compute in. Every rank must call it, where there are several: they tell each other."""
    own = Preference.of(device, recipe, ranks)
    if ranks.world_size == 1 or not dist.is_initialized():
        return common([own])
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, asdict(own))
    return common([Preference(**one) for one in found])
