"""Fits the temperature that logits are divided by, so that probabilities are as often right as they say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn import functional

from launcher.engine.device import Device
from launcher.engine.distributed import Ranks, init_process_group
from launcher.engine.losses import sigmoids
from launcher.engine.validating.ranking import Calibration
from launcher.system import phases
from launcher.tools import publish

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir
    from launcher.tools.evaluate import BestModel
    from launcher.tools.formats import Say

CPU = Device(type="cpu")
STEPS = 100
"""Of L-BFGS over a single number, which needs about ten."""


def apply(run: RunDir, best: BestModel, missing: str | None, say: Say) -> tuple[BestModel, dict[str, Any] | None]:
    """The model with the temperature that ``post.calibrate`` asks for, and what there is to say of it.

    Without images it is that of the checkpoint's earlier exports, which stay beside the new ones.

    Args:
        run: the run directory.
        best: its checkpoint.
        missing: why there are no validation images; None: there are.
        say: tells the user a line.
    """
    if best.recipe.post.calibrate == "none":
        return best, None
    if missing:
        earlier = publish.calibration_of(run, best.state["step"])
        if earlier is None:
            return best, None
        say(f"temperature {earlier['temperature']:.3f}, that of the earlier exports of this checkpoint: {missing}")
        return replace(best, temperature=earlier["temperature"]), earlier
    phases.at("fitting the temperature")
    found = measure(best)
    say(
        f"temperature {found['temperature']:.3f}: calibration error {found['ece_before']:.4f} before and "
        f"{found['ece_after']:.4f} after, on the {found['images']} validation images that it was fitted on"
    )
    return replace(best, temperature=found["temperature"]), found


def measure(best: BestModel) -> dict[str, Any]:
    """Temperature scaling (Guo et al. 2017, arXiv 1706.04599) on the validation images.

    Returns:
        ``temperature``; ``ece_before`` and ``ece_after``: the calibration error on these same ``images``.
    """
    logits, targets = [], []
    with torch.inference_mode():
        for images, labels in best.batches("val"):
            logits.append(best.module(images))
            targets.append(labels)
    found, true = torch.cat(logits).clone(), torch.cat(targets)
    temperature = fit(found, true, independent=best.independent)
    errors = [error_of(found / divisor, true, independent=best.independent) for divisor in (1.0, temperature)]
    facts = {"method": "temperature", "temperature": temperature, "images": len(true)}
    return facts | {"ece_before": errors[0], "ece_after": errors[1]}


def fit(logits: torch.Tensor, targets: torch.Tensor, *, independent: bool) -> float:
    """The temperature at which the likelihood of the targets is largest."""
    values, wanted = logits.double(), _as_sets(logits, targets) if independent else targets
    log = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log], max_iter=STEPS, line_search_fn="strong_wolfe")
    loss_of = functional.binary_cross_entropy_with_logits if independent else functional.cross_entropy

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(values / log.exp(), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(log.detach().exp().clamp(0.01, 100.0))


def error_of(logits: torch.Tensor, targets: torch.Tensor, *, independent: bool) -> float:
    """The expected calibration error, as validation measures it."""
    init_process_group(CPU, Ranks())  # counts are added up over ranks, of which there is one
    try:
        calibration = Calibration(CPU.torch_device)
        probabilities = sigmoids(logits) if independent else logits.float().softmax(dim=1)
        if targets.dim() > 1:
            calibration.add(probabilities.flatten(), targets.flatten() > 0)
        else:
            confidences, answers = probabilities.max(dim=1)
            calibration.add(confidences, answers == targets)
        return calibration.compute()
    finally:
        dist.destroy_process_group()


def _as_sets(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    of_class = targets if targets.dim() > 1 else functional.one_hot(targets, logits.shape[1])
    return of_class.double()
