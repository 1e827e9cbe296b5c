"""Computes a checkpoint's answers as the validation of its run did, as far as this machine can."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.device import Device
from launcher.engine.numerics import Numerics
from launcher.engine.schedule import Batching, all_validation_batches
from launcher.engine.validating.forward import logits_of
from launcher.tools import evaluate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from launcher.engine.device import Precision
    from launcher.runs.run_dir import RunDir
    from launcher.tools.evaluate import BestModel

    Batch = tuple[torch.Tensor, torch.Tensor]

CPU = Device(type="cpu")


@dataclass(frozen=True, kw_only=True)
class AsValidated:
    """A model on its device."""

    best: BestModel
    """Whose module is on the device."""
    device: Device
    """A GPU where the run had GPUs and this machine has one, else the CPU."""
    numerics: Numerics
    """Those of the run; float32 where this device has no units for its precision, unless the recipe names that."""
    batching: Batching | None
    """How the run's ranks divided images into batches; None: not known, or those of another device's memory."""
    differs: str
    """What is computed in another way than in the run, in words; empty: nothing."""

    @classmethod
    def of(cls, run: RunDir, best: BestModel) -> AsValidated:
        """Move ``best`` to its device. Of what older checkpoints do not say, the run's last launch is asked."""
        state = best.state
        of_run = state.get("device") or run.read_plan().device
        device = Device(type="cuda") if of_run == "cuda" and torch.cuda.is_available() else CPU
        device.activate()
        wanted: Precision | None = state.get("precision")
        is_asked = device.type == of_run and best.recipe.precision == wanted
        precision = wanted if wanted and (is_asked or device.computes(wanted)) else "fp32"
        differs = ["without train.compile"] if best.recipe.train.compile else []
        differs += [f"in {precision} instead of {wanted or 'what is not recorded'}"] if precision != wanted else []
        differs += ["on the CPU instead of a GPU"] if device.type != of_run else []
        numerics = Numerics(precision=precision, channels_last=state.get("channels_last"))
        return cls(
            best=best,
            device=device,
            numerics=numerics.place(best.module, device),
            batching=_dealt(state) if device.type == of_run else None,
            differs=", ".join(differs),
        )

    def batches(self, split: str) -> Iterator[Batch]:
        """Images of a split as they are decoded, and labels, each image once, as they go through the model."""
        samples = self.best.dataset(split)
        num = len(samples)
        parts = evaluate.in_batches(range(num))
        if self.batching:
            parts = all_validation_batches(num, self.batching, together=self.device.batches_in_validation)
        decoded = evaluate.loaded(samples, evaluate.in_batches([*chain(*parts)]))  # as many as memory is reckoned with
        yield from _regrouped(decoded, map(len, parts))

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Of a batch of decoded images, on the device."""
        return logits_of(self._answer, images, self.device, self.numerics.precision)

    def _answer(self, images: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.numerics.channels_last else torch.contiguous_format
        (sent,) = self.device.send((images,))()
        found: torch.Tensor = self.best.module(self.best.preprocessing.normalize(sent).contiguous(memory_format=layout))
        return found


def _dealt(state: dict[str, Any]) -> Batching | None:
    """As ``state.json`` has it; None: an older one has not."""
    saved = state.get("batching")
    return saved and Batching(
        batch_sizes=tuple(saved["batch_sizes"]),
        shares=tuple(saved["shares"]),
        global_batch_size=saved["global_batch_size"],
    )


def _regrouped(batches: Iterable[Batch], sizes: Iterable[int]) -> Iterator[Batch]:
    """The same images in the same order, in batches of these sizes."""
    held: list[Batch] = []
    batches = iter(batches)
    for size in sizes:
        while sum(len(labels) for _, labels in held) < size:
            held.append(next(batches))
        images, labels = (torch.cat(parts) for parts in zip(*held, strict=True))
        held = [(images[size:], labels[size:])]
        yield images[:size], labels[:size]
