"""Measures a run's best checkpoint on labelled images, by all that validation measures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.engine.distributed import Ranks, init_process_group
from launcher.engine.losses import build_loss
from launcher.engine.validating import redraw
from launcher.engine.validating.build import build_totals, build_user_metrics
from launcher.errors import UsageError
from launcher.images import datasets
from launcher.images.listing import Listing
from launcher.recipe.images import source_of
from launcher.system import phases
from launcher.tools import calibrate, evaluate, trained_model
from launcher.tools.as_validated import AsValidated

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.runs.run_dir import RunDir
    from launcher.tools.evaluate import BestModel


def score(
    run: RunDir,
    *,
    folder: Path | None = None,
    columns: dict[str, str] | None = None,
    split: str = "val",
    mirrored: bool = False,
) -> dict[str, Any]:
    """What validation writes into metrics.jsonl, of the best checkpoint, computed as the run's validation was.

    Args:
        run: the run directory.
        folder: labelled images, ``folder/CLASS/*.jpg`` or a list; None: those of the run.
        columns: what such a list calls its columns; None: as the run's recipe says.
        split: which of the run's splits, where ``folder`` is None.
        mirrored: test-time augmentation: the logits of each image are the mean of its own and its mirror image's.

    Returns:
        ``samples``, the value of each metric, ``per_class`` and ``confusion``; ``intervals``: 95 % intervals of what
        does not follow from these, where images are few; ``images``: what was measured on;
        ``computed_in``: precision of the forward pass; ``differs``: what was computed in another way than in the run,
        or None; where the exports were calibrated, ``temperature`` and ``ece_calibrated``, beside ``ece`` without it.

    Raises:
        UsageError: there are no such images, or of classes that the model does not know.
    """
    phases.at("reading the best checkpoint")
    best = evaluate.load_best(run)
    if folder is not None:
        best, split = _on(best, folder, columns), "val"
    elif missing := best.missing(split):
        raise UsageError(f"{missing}; labelled images elsewhere: launch evaluate {run} --data FOLDER")
    model = AsValidated.of(run, best)
    to = model.device.torch_device
    loss = build_loss(best.recipe.train, num_classes=len(best.classes), device=to)
    init_process_group(model.device, Ranks())  # counts are added up over ranks, of which there is one
    try:
        own = build_user_metrics(best.recipe, len(best.classes), to)
        totals = build_totals(best.recipe, best.classes, to, loss, own)
        answers: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.inference_mode(), phases.during("measuring images") as seen:
            num, total = 0, len(best.dataset(split))
            for images, labels in model.batches(split):
                num += len(labels)
                seen(num, total)
                logits = model.logits(images)
                if mirrored:
                    logits = (logits.float() + model.logits(images.flip(-1)).float()) / 2
                totals.add(logits, labels.to(to))
                answers.append((logits.float().cpu(), labels))
        found = totals.compute()
        found["intervals"] = redraw.intervals(totals.answers(None, found["samples"]).scores)
    finally:
        dist.destroy_process_group()
    data = best.recipe.data
    where = str(folder) if folder else data.dataset or f"{data.path or data.name}/{split}"
    how = {"images": where, "computed_in": model.numerics.precision, "differs": model.differs or None}
    return how | found | how | _calibrated(run, best, answers)


def _calibrated(run: RunDir, best: BestModel, answers: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """The calibration error of the probabilities that predictions show, where the exports were calibrated."""
    temperature = trained_model.temperature_of(run, best.state["step"])
    if temperature == 1.0:
        return {}
    logits, labels = (torch.cat(part) for part in zip(*answers, strict=True))
    error = calibrate.error_of(logits / temperature, labels, independent=best.independent)
    return {"temperature": temperature, "ece_calibrated": error}


def _on(best: BestModel, place: Path, columns: dict[str, str] | None) -> BestModel:
    """The same model, with a folder of class folders, or all rows of a list, as its validation."""
    place = datasets.prepare("imagefolder", str(place.expanduser().absolute()))
    data = replace(best.recipe.data, name="imagefolder", path=str(place.parent), dataset=None, val=place.name)
    data = replace(data, columns=data.columns if columns is None else columns)
    recipe = replace(best.recipe, data=replace(data, train=None, val_fraction=None, group=None))
    part = Listing(source_of(recipe), best.classes).part("val")
    if part is None:
        raise UsageError(f"--data {place}: no such folder or list; a folder must hold CLASS/*.jpg")
    classes = part.class_names
    unknown = sorted(set(classes) - set(best.classes))
    if unknown or not classes:
        problem = f"holds {unknown[0]!r}, which is no class of the model" if unknown else "has no class folders in it"
        splits = [name for name in ("val", "test", "train") if (place / name).is_dir()]
        hint = f"; name one of its splits: --data {place / splits[0]}" if splits else f": {', '.join(best.classes[:8])}"
        raise UsageError(f"--data {place}: {problem}{hint}")
    moved = replace(best, recipe=recipe, left_out=frozenset())
    if not len(moved.dataset("val")):
        raise UsageError(f"--data {place}: no images in it")
    return moved
