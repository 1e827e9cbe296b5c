"""Computes a checkpoint's answers as the validation of its run did, as far as this machine can."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from launcher.engine.device import Device
from launcher.engine.numerics import Numerics
from launcher.engine.schedule import Batching, validation_batches
from launcher.engine.validating.forward import logits_of
from launcher.tools import evaluate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.engine.device import Precision
    from launcher.runs.run_dir import RunDir
    from launcher.tools.evaluate import BestModel

CPU = Device(type="cpu")


@dataclass(frozen=True, kw_only=True)
class AsValidated:
    """A model on its device."""

    best: BestModel
    """Whose module is on the device."""
    device: Device
    """A GPU where the run had GPUs and this machine has one, else the CPU."""
    numerics: Numerics
    """Those of the run; float32 on another device than the run's that has no units for its precision."""
    batching: Batching | None
    """How the run's ranks divided images into batches; None: they were those of another device's memory."""
    differs: str
    """What is computed in another way than in the run, in words; empty: nothing."""

    @classmethod
    def of(cls, run: RunDir, best: BestModel) -> AsValidated:
        """Move ``best`` to its device."""
        of_run, state = run.read_plan().device, best.state
        device = Device(type="cuda") if of_run == "cuda" and torch.cuda.is_available() else CPU
        device.activate()
        wanted: Precision = state["precision"]
        is_asked = device.type == of_run and best.recipe.precision == wanted
        precision = wanted if is_asked or device.computes(wanted) else "fp32"
        differs = ["without train.compile"] if best.recipe.train.compile else []
        differs += [f"in {precision} instead of {wanted}"] if precision != wanted else []
        differs += ["on the CPU instead of a GPU"] if device.type != of_run else []
        numerics = Numerics(precision=precision, channels_last=state["channels_last"])
        dealt = state["batching"]
        batching = Batching(
            batch_sizes=tuple(dealt["batch_sizes"]),
            shares=tuple(dealt["shares"]),
            global_batch_size=dealt["global_batch_size"],
        )
        return cls(
            best=best,
            device=device,
            numerics=numerics.place(best.module, device),
            batching=batching if device.type == of_run else None,
            differs=", ".join(differs),
        )

    def batches(self, split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised images and labels of a split on the device, each image once."""
        samples = self.best.dataset(split)
        layout = torch.channels_last if self.numerics.channels_last else torch.contiguous_format
        for batch in evaluate.loaded(samples, self._parts(len(samples))):
            images, labels = self.device.send(batch)()
            yield self.best.preprocessing.normalize(images).contiguous(memory_format=layout), labels

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Of a batch."""
        return logits_of(self.best.module, images, self.device, self.numerics.precision)

    def _parts(self, num: int) -> list[list[int]]:
        """Indices of the images that go through the model at once."""
        if self.batching is None:
            return evaluate.in_batches(range(num))
        parts, at_once = [], self.device.batches_in_validation
        for rank in range(len(self.batching.shares)):
            of_rank = validation_batches(num, rank=rank, batching=self.batching)
            parts += [list(chain(*of_rank[at : at + at_once])) for at in range(0, len(of_rank), at_once)]
        return [part for part in parts if part]
