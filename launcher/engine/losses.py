"""Losses: of ours one function and one row each; and a recipe's own, made from its reference.

A loss is called with logits (float32 N x C) and targets (int64 N, the true classes), and gives the losses of the N
samples, or their mean as a scalar. Means of a step are over samples, however these are spread over ranks and
micro-batches (invariant 3): a scalar counts N times.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from launcher.engine.user import objects as user_objects
from launcher.errors import TrainingError
from launcher.recipe import user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.recipe.schema_train import TrainConfig


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Of softmax; with smoothing that fraction of the target is spread over all classes."""
    return functional.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def binary_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each class against all others, by a sigmoid, summed over the classes (Wightman et al. 2021, arXiv 2110.00476).

    Targets may also say which classes are true, N x C; ``pos_weight`` (C) is what having a class counts.
    """
    is_set = targets.dim() > 1
    wanted = targets.to(logits) if is_set else functional.one_hot(targets, logits.shape[1]).to(logits)
    wanted = wanted * (1 - label_smoothing) + label_smoothing / (2 if is_set else logits.shape[1])
    weight = None if pos_weight is None else pos_weight.to(logits)
    losses = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none", pos_weight=weight)
    return losses.sum(dim=1)


def focal(logits: torch.Tensor, targets: torch.Tensor, *, gamma: float = 2.0) -> torch.Tensor:
    """Cross-entropy, less of what is right already (Lin et al. 2017, arXiv 1708.02002); gamma 0 is cross-entropy."""
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return (1 - (-losses).exp()) ** gamma * losses


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "focal": focal,
}
"""By the name that ``train.loss`` gives; ``launch`` reads the names from this text, without importing torch."""

INDEPENDENT = {"binary_cross_entropy"}
"""Of those, which have a model learn a probability of each class by itself (a sigmoid), not of one among all."""


NO_WEIGHTS = (
    "returned a mean over samples, which data.balance=weights cannot weigh by class: return the loss of each sample, "
    "or take data.balance=sampler"
)
NO_SAMPLE_WEIGHTS = (
    "returned a mean over samples, which cannot be weighed by the list's column of weights: return the loss of each "
    "sample, or name another column than that of the weights: 'data.columns={weight: none}'"
)


class Loss:
    """The loss of a run, whatever it was made from, as sums over samples.

    Args:
        name: what messages call it.
        function: called with logits and targets; an ``nn.Module`` is told whether it trains.
        in_training: further arguments, by name, which validation does without.
        weights: what the loss of a sample of each class counts in training; None: all the same.
        independent: whether each class has a probability of its own (a sigmoid); else they add up to 1 (softmax).
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        in_training: dict[str, Any],
        weights: torch.Tensor | None = None,
        *,
        independent: bool = False,
    ) -> None:
        self.name = name
        self.function = function
        self.gives_means = False
        """Whether the function was seen to give the mean of a batch, not the loss of each sample."""
        self._in_training = in_training
        self._weights = weights
        self._independent = independent

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each class, float32 N x C."""
        return sigmoids(logits) if self._independent else logits.float().softmax(dim=1)

    def call(self, logits: torch.Tensor, targets: torch.Tensor, *, training: bool) -> Any:
        """What the function gives."""
        if isinstance(self.function, nn.Module):
            self.function.train(training)
        further = dict(self._in_training) if training else {}
        if training and targets.dim() > 1 and self._weights is not None:
            further["pos_weight"] = self._weights
        return self.function(at_least_float32(logits), targets, **further)

    def sum(
        self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None, *, training: bool
    ) -> torch.Tensor:
        """The sum over samples, a scalar: float32 in training (float64 of such logits), float64 in validation.

        Args:
            logits: N x C.
            targets: as the function takes them.
            weights: what the loss of each sample counts (N); None: all the same.
            training: as in training.

        Raises:
            TrainingError: the function gave something else than a loss.
        """
        num = len(targets)
        if not num:
            return at_least_float32(logits).sum()  # of nothing, which DDP can still differentiate
        found = self._checked(logits, targets, training=training)
        if training and self._weights is not None and targets.dim() == 1:
            if not found.dim():
                raise TrainingError(f"train.loss: {self.name} {NO_WEIGHTS}")
            found = found * self._weights.to(found.dtype)[targets]
        if weights is not None:
            if not found.dim():
                raise TrainingError(f"train.loss: {self.name} {NO_SAMPLE_WEIGHTS}")
            found = found * weights.to(found.dtype)
        dtype = torch.promote_types(logits.dtype, torch.float32) if training else torch.float64
        total: torch.Tensor = found.sum(dtype=dtype) if found.dim() else found.to(dtype) * num
        return total

    def each(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """In validation the losses of the samples, float64 N; where the function gives their mean, that of each.

        Raises:
            TrainingError: the function gave something else than a loss.
        """
        found = self._checked(logits, targets, training=False)
        self.gives_means = not found.dim()
        return found.double().expand(len(targets))

    def _checked(self, logits: torch.Tensor, targets: torch.Tensor, *, training: bool) -> torch.Tensor:
        found: torch.Tensor = self.call(logits, targets, training=training)
        if problem := find_problem(found, len(targets), needs_gradient=training and logits.requires_grad):
            raise TrainingError(f"train.loss: {self.name} {problem}")
        return found


def sigmoids(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities, float32. Computed in float64: float32's last bit depends on an image's place in its batch."""
    return logits.double().sigmoid().float()


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Losses of half precision are rounded off."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def build_loss(
    config: TrainConfig, *, num_classes: int, device: torch.device, weights: Sequence[float] | None = None
) -> Loss:
    """The loss that a recipe names; it is imported here, on every rank.

    Args:
        config: the recipe's.
        num_classes: outputs of the model.
        device: where it computes.
        weights: what the loss of a sample of each class counts in training; None: all the same.
    """
    smoothing = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
    if config.loss in LOSSES:
        function: Any = functools.partial(LOSSES[config.loss], **config.loss_args)
    else:
        function = user_objects.build(config.loss, config.loss_args, num_classes=num_classes, takes=2)
    if isinstance(function, nn.Module):
        function.to(device)
    weighing = None if weights is None else torch.tensor(weights, dtype=torch.float64, device=device)
    return Loss(user_code.shown(config.loss), function, smoothing, weighing, independent=config.loss in INDEPENDENT)


def find_problem(found: Any, num: int, *, needs_gradient: bool) -> str | None:
    """What is wrong with what a loss gave for ``num`` samples; words that follow its name."""
    valid = f"valid: a tensor of shape ({num},) with the loss of each sample, or their mean as a scalar"
    if not isinstance(found, torch.Tensor):
        return f"returned {type(found).__name__}; {valid}"
    if found.shape not in ((), (num,)):
        return f"returned a tensor of shape {tuple(found.shape)} for {num} samples; {valid}"
    if not found.is_floating_point():
        return f"returned a tensor of {found.dtype}; {valid}"
    if needs_gradient and not found.requires_grad:
        return (
            "returned a tensor that no gradient leads to: nothing would be learned; compute it from the logits without "
            "detach(), item(), argmax() or torch.no_grad()"
        )
    return None
