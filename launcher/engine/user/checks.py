"""Tries a recipe's losses, metrics and listeners before anything is started, with made-up answers.

What only shows when the user's own code runs is told here: shapes, gradients, and whether a loss or a metric means the
same on one rank and on several.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.engine import losses
from launcher.engine.listeners import listeners
from launcher.engine.user import objects
from launcher.errors import UsageError
from launcher.recipe import metrics as recipe_metrics
from launcher.recipe import user_code
from launcher.runs.user_code import load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from launcher.recipe.schema import Recipe
    from launcher.recipe.schema_train import TrainConfig

NUM_TRIED = 12
"""Samples of the trial of a loss."""
TOLERANCE = 1e-3
"""By which part the sum of a loss over samples may differ from that over two parts of them, for rounding."""


def find(recipe: Recipe, num_classes: int, *, weighed: bool = False) -> Iterator[tuple[str, str]]:
    """What is wrong with what a recipe brings; keys, and words.

    Args:
        recipe: its references lead to code that can be imported.
        num_classes: outputs of the model.
        weighed: a list gives images weights.
    """
    config, weighs, several = recipe.train, recipe.data.balance == "weights", recipe.data.task == "multi_label"
    if problem := _told(
        functools.partial(_loss_problem, config, num_classes, weighs=weighs, several=several, weighed=weighed)
    ):
        yield "train.loss", problem
    for index, row in enumerate(listeners.rows(config.listeners)):
        if problem := _told(functools.partial(_listener_problem, row.listener)):
            yield f"train.listeners.{index}", problem
    if not recipe.metrics:
        return
    from launcher.engine.user import metrics

    for index, metric in enumerate(recipe_metrics.configs(recipe.metrics).values()):
        if problem := _told(functools.partial(metrics.find_problem, metric, num_classes, several=several)):
            yield f"metrics.{index}", problem


def _told(look: Callable[[], str | None]) -> str | None:
    """What ``look`` finds. An exception of the user's own code is not caught: it is shown with its traceback."""
    try:
        return look()
    except UsageError as error:
        return str(error)


def _loss_problem(config: TrainConfig, num_classes: int, *, weighs: bool, several: bool, weighed: bool) -> str | None:
    loss = losses.build_loss(config, num_classes=num_classes, device=torch.device("cpu"))
    if isinstance(loss.function, nn.Module):
        learned = [name for name, value in loss.function.named_parameters() if value.requires_grad]
        if learned:
            return (
                f"{loss.name} has parameters ({', '.join(learned[:4])}), which nothing would train; make them buffers"
            )
    if problem := _lacking_argument(loss.function, config, by_class=several and weighs):
        return f"{loss.name} {problem}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = torch.randn(NUM_TRIED, num_classes).requires_grad_()
        sets = torch.randint(2, (NUM_TRIED, num_classes)).float() if several else None
        targets = torch.randint(num_classes, (NUM_TRIED,)) if sets is None else sets
        try:
            found = loss.call(logits, targets, training=True)
        except (TypeError, ValueError) as error:
            if config.loss not in losses.LOSSES:
                raise
            raise UsageError(f"{config.loss} with {config.loss_args}: {type(error).__name__}: {error}") from error
        problem = losses.find_problem(found, NUM_TRIED, needs_gradient=True)
        if problem := problem or _lacking_losses(found, by_class=weighs and not several, weighed=weighed):
            return f"{loss.name} {problem}"
        whole, again = (float(loss.sum(logits, targets, training=True).detach()) for _ in range(2))
        cut = NUM_TRIED // 2 - 1
        parts = [loss.sum(logits[part], targets[part], training=True) for part in (slice(cut), slice(cut, None))]
        spread = float(torch.stack(parts).sum().detach())
    if not math.isclose(whole, again, rel_tol=TOLERANCE, abs_tol=TOLERANCE):  # it is random
        return None
    if not math.isclose(whole, spread, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        return (
            f"{loss.name} is {whole / NUM_TRIED:.6g} for {NUM_TRIED} samples at once and {spread / NUM_TRIED:.6g} "
            "for the same in two parts: what is learned would depend on how a step is spread over ranks and batches; "
            "return the loss of each sample, which depends on no other one, or their plain mean"
        )
    return None


def _lacking_losses(found: torch.Tensor, *, by_class: bool, weighed: bool) -> str | None:
    """That a mean has no losses of samples to be weighed."""
    if found.dim():
        return None
    return losses.NO_WEIGHTS if by_class else losses.NO_SAMPLE_WEIGHTS if weighed else None


def _lacking_argument(function: Callable[..., Any], config: TrainConfig, *, by_class: bool) -> str | None:
    """What a loss does not take and the recipe needs; words that follow its name."""
    if config.label_smoothing and not objects.takes(function, "label_smoothing"):
        return f"takes no label_smoothing, and train.label_smoothing is {config.label_smoothing:g}"
    if by_class and not objects.takes(function, "pos_weight"):
        return "takes no pos_weight (C), by which data.balance=weights weighs the classes of data.task=multi_label"
    return None


def _listener_problem(reference: str) -> str | None:
    found = load(reference)
    is_function = callable(found) and not isinstance(found, type) and hasattr(found, "__code__")
    problems = [] if is_function else list(listeners.find_problems(found))  # of what a function makes: when it is made
    return f"{user_code.shown(reference)} {'; '.join(problems)}" if problems else None
