"""What a model's logits mean: the probability of each class, and which classes an image may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """Of the logits of an image, float32 N x C."""

    classes: list[str]
    """Names, in the order of the logits."""
    independent: bool
    """Each class has a probability of its own (a sigmoid); else they add up to 1 (softmax)."""
    threshold: float | None = None
    """The probability, before ``temperature``, from which on an image has a class, of which it has any number; None: it
    has one."""
    temperature: float = 1.0
    """What logits are divided by before they become probabilities."""

    def probabilities(self, logits: Floats) -> Floats:
        """Calibrated, float32 N x C."""
        logits = logits / np.float32(self.temperature)
        if self.independent:
            parts, whole = 1 / (1 + np.exp(-logits)), np.ones(1, np.float32)
        else:
            parts = np.exp(logits - logits.max(axis=1, keepdims=True))
            whole = parts.sum(axis=1, keepdims=True)
        return np.asarray(parts / whole, np.float32)

    def likeliest(self, logits: Floats, top: int) -> list[tuple[tuple[str, float], ...]]:
        """Of each image the likeliest classes that it may have, each with its probability."""
        found = []
        for row, reach in zip(self.probabilities(logits), self._reach_threshold(logits), strict=True):
            order = np.argsort(-row, kind="stable")[:top]
            found.append(tuple((self.classes[i], float(row[i])) for i in order[reach[order]]))
        return found

    def _reach_threshold(self, logits: Floats) -> Any:
        """Which classes an image may have: by the probability before calibration, as validation judged it."""
        if self.threshold is None:
            return np.ones(logits.shape, np.bool_)
        return 1 / (1 + np.exp(-logits)) >= self.threshold
