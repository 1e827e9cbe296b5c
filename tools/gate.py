"""Says whether an exported model is accepted: its answers to the validation images beside the checkpoint's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from launcher.tools import evaluate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.recipe.schema_post import PostConfig
    from launcher.tools.evaluate import BestModel, Predictor

REFERENCE = "pytorch"
"""The checkpoint's own module."""
MIN_AGREEMENT = 0.99
"""Least agreement of a float32 export, whatever post.min_agreement is: it computes the same network."""


class Answers:
    """What models answer to the validation images; each model is asked once.

    Args:
        best: the checkpoint.
        missing: why there are no validation images; None: there are.
    """

    def __init__(self, best: BestModel, missing: str | None) -> None:
        self.missing = missing
        self.true = torch.empty(0, dtype=torch.int64)
        self._best = best
        self._predicted: dict[str, torch.Tensor] = {}

    def ask(self, predictors: Mapping[str, Predictor]) -> None:
        """Ask those that were not asked yet."""
        new = {name: predictor for name, predictor in predictors.items() if name not in self._predicted}
        if new and not self.missing:
            found, self.true = evaluate.predict(new, self._best)
            self._predicted |= found

    def try_out(self, name: str, predictor: Predictor, *, is_quantized: bool) -> str | None:
        """The :meth:`verdict` on a model that was made anew under its name."""
        self._predicted.pop(name, None)
        self.ask({REFERENCE: self._best.module, name: predictor})
        return self.verdict(name, is_quantized=is_quantized)

    def verdict(self, name: str, *, is_quantized: bool) -> str | None:
        """Why a model that was asked is not accepted; None: it is, or there is nothing to judge it by."""
        if self.missing:
            return None
        return rejection(self.compare(name), self._best.recipe.post, is_quantized=is_quantized, num=len(self.true))

    def top1(self, name: str) -> float | None:
        """The fraction of images that a model is right about; None: not measured."""
        return _fraction_same(self._predicted.get(name), self.true)

    def compare(self, name: str) -> dict[str, Any]:
        """A model beside the checkpoint, as the manifest has it; all None where it is not measured."""
        found, reference = self._predicted.get(name), self._predicted.get(REFERENCE)
        own, checkpoint = self.top1(name), self.top1(REFERENCE)
        changed = None if found is None or reference is None else int(found.ne(reference).sum())
        return {
            "top1": own,
            "agreement": _fraction_same(found, reference),
            "num_changed": changed,
            "top1_drop": 100 * (checkpoint - own) if checkpoint is not None and own is not None else None,
        }


def _fraction_same(found: torch.Tensor | None, expected: torch.Tensor | None) -> float | None:
    """The fraction of images on which two agree; None if either is None."""
    return None if found is None or expected is None else (found == expected).double().mean().item()


def rejection(row: Mapping[str, Any], post: PostConfig, *, is_quantized: bool, num: int) -> str | None:
    """Why an export that compares with the checkpoint like this is not accepted, or None."""
    reasons = []
    if row["top1_drop"] > post.max_top1_drop + 1e-9:
        reasons.append(
            f"loses {row['top1_drop']:.2f} points of top-1; post.max_top1_drop allows {post.max_top1_drop:g}"
        )
    least = post.min_agreement if is_quantized else max(MIN_AGREEMENT, post.min_agreement)
    if row["agreement"] < least - 1e-9:
        key = "post.min_agreement" if least == post.min_agreement else "a float32 export"
        reasons.append(
            f"agrees with the checkpoint on {row['agreement']:.2%} of the images ({row['num_changed']} of {num} "
            f"answers changed); {key} asks for {100 * least:g}%"
        )
    return "; ".join(reasons) or None
