"""What a run's validation counts with, as its recipe says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.engine.validating.multi_label import MultiLabelTotals
from launcher.engine.validating.totals import ValidationTotals

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch

    from launcher.engine.losses import Loss
    from launcher.engine.user.metrics import UserMetrics
    from launcher.recipe.schema import Recipe

    Totals = ValidationTotals | MultiLabelTotals


def build_totals(
    recipe: Recipe,
    classes: Sequence[str],
    device: torch.device,
    loss: Loss,
    own: UserMetrics | None,
    picked: Collection[int] = (),
) -> Totals:
    """Counts of one validation, of one class an image or of several.

    Args:
        recipe: the run's.
        classes: names, in the order of the logits.
        device: where logits will be.
        loss: of the run.
        own: the recipe's own metrics.
        picked: places of images, in this rank's share, of which the answer is kept.
    """
    if recipe.data.task == "multi_label":
        return MultiLabelTotals(classes, device, loss, own, threshold=recipe.data.threshold, picked=picked)
    return ValidationTotals(classes, device, loss, own)


def build_user_metrics(recipe: Recipe, num_classes: int, device: torch.device) -> UserMetrics | None:
    """The recipe's own metrics; torchmetrics, which takes a second, is imported only where there are some."""
    if not recipe.metrics:
        return None
    from launcher.engine.user.metrics import UserMetrics

    return UserMetrics(recipe, num_classes=num_classes, device=device)
