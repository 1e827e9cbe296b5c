"""Says whether an exported model is accepted: its answers to the validation images beside the checkpoint's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from launcher.system import phases
from launcher.tools import paired
from launcher.tools.evaluate import KeptBatches

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.recipe.schema_post import PostConfig
    from launcher.tools.evaluate import BestModel, Predictor

REFERENCE = "pytorch"
"""The checkpoint's own module."""
MIN_AGREEMENT = 0.99
"""Least agreement of a float32 export, whatever post.min_agreement is: it computes the same network."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says of all validation images."""

    chosen: torch.Tensor
    """Bool N x C: the likeliest class, or where an image may be of several, each above the threshold."""
    max_logit_diff: float
    """The greatest distance of a logit from the checkpoint's."""
    images_per_s: float
    """How many it computed, in batches as they are decoded; decoding not counted."""


class Answers:
    """What models answer to the validation images, which are decoded once; the checkpoint computes them once.

    Args:
        best: the checkpoint.
        missing: why there are no validation images; None: there are.
    """

    def __init__(self, best: BestModel, missing: str | None) -> None:
        self.missing = missing
        self._best = best
        self._images = KeptBatches(best, "val")
        self._logits: list[torch.Tensor] = []
        """The checkpoint's, batch by batch."""
        self._true = torch.empty(0, len(best.classes), dtype=torch.bool)
        self._answers: dict[str, Answer] = {}

    @property
    def num(self) -> int:
        """How many images there are; 0 until a model was asked."""
        return len(self._true)

    def ask(self, name: str, predictor: Predictor) -> None:
        """Have a model answer, anew if one of that name has; the checkpoint answers before the first one."""
        if self.missing:
            return
        self.ask_checkpoint()
        self._answers[name] = self._compute(predictor)

    def ask_checkpoint(self) -> None:
        """Have the checkpoint answer, unless it has."""
        if not self.missing and REFERENCE not in self._answers:
            phases.at("measuring the checkpoint")
            self._answers[REFERENCE] = self._compute(self._best.module)

    @torch.inference_mode()
    def _compute(self, predictor: Predictor) -> Answer:
        is_first, seconds, greatest = not self._logits, 0.0, 0.0
        chosen, true = [], []
        seen, of_all = 0, f" of {self.num:,}" if self.num else ""
        for number, (images, labels) in enumerate(self._images):
            start = time.perf_counter()
            logits = predictor(images)
            seconds += time.perf_counter() - start
            seen += len(images)
            phases.update(f"on {seen:,}{of_all} images")
            if is_first:
                self._logits.append(logits)
                true.append(_as_rows(labels, logits))
            greatest = max(greatest, (logits - self._logits[number]).abs().max().item())
            chosen.append(self._choose(logits))
        if is_first:
            self._true = torch.cat(true)
        return Answer(chosen=torch.cat(chosen), max_logit_diff=greatest, images_per_s=self.num / max(seconds, 1e-9))

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Bool N x C."""
        threshold = self._best.threshold
        if threshold is not None:
            return logits.sigmoid() >= threshold
        return _one_hot(logits.argmax(dim=1), logits.shape[1])

    def verdict(self, found: Mapping[str, Any], *, is_quantized: bool) -> str | None:
        """Why a model that compares like this is not accepted; None: it is, or there is nothing to judge it by."""
        if self.missing:
            return None
        return rejection(found, self._best.recipe.post, is_quantized=is_quantized, num=self.num)

    def measured(self, name: str) -> dict[str, Any]:
        """A model by itself, as the manifest has it; all None where it is not measured."""
        answer = self._answers.get(name)
        if answer is None:
            return {"top1": None, "f1": None}
        right = _same(answer.chosen, self._true)
        return {"top1": right.double().mean().item(), "f1": _macro_f1(answer.chosen, self._true)}

    def images_per_s(self, name: str) -> float | None:
        """How fast a model answered; None: it was not asked."""
        return self._answers[name].images_per_s if name in self._answers else None

    def compare(self, name: str) -> dict[str, Any]:
        """A model beside the checkpoint, as the manifest has it; all None where it is not measured."""
        answer, reference = self._answers.get(name), self._answers.get(REFERENCE)
        if answer is None or reference is None:
            keys = ("agreement", "num_changed", "max_logit_diff", "top1_drop", "top1_drop_interval", "mcnemar_p")
            return self.measured(name) | dict.fromkeys((*keys, "worst_class"))
        was_right, is_right = _same(reference.chosen, self._true), _same(answer.chosen, self._true)
        lost, gained = int((was_right & ~is_right).sum()), int((is_right & ~was_right).sum())
        changed = int((~_same(answer.chosen, reference.chosen)).sum())
        return self.measured(name) | {
            "agreement": 1 - changed / self.num,
            "num_changed": changed,
            "max_logit_diff": answer.max_logit_diff,
            "top1_drop": 100 * (lost - gained) / self.num,
            "top1_drop_interval": [100 * end for end in paired.difference_interval(lost, gained, self.num)],
            "mcnemar_p": paired.mcnemar_p(lost, gained),
            "worst_class": self._worst_class(answer, reference),
        }

    def _worst_class(self, answer: Answer, reference: Answer) -> dict[str, Any]:
        """The class that loses most of its images against the checkpoint."""
        num = self._true.sum(dim=0)
        own, before = ((each.chosen & self._true).sum(dim=0) / num.clamp(min=1) for each in (answer, reference))
        worst = int((before - own).argmax())
        return {
            "class": self._best.classes[worst],
            "recall": own[worst].item(),
            "recall_of_checkpoint": before[worst].item(),
            "samples": int(num[worst]),
        }


def _as_rows(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Labels as bool N x C, from int64 N or from 0 and 1 N x C."""
    return labels > 0 if labels.dim() > 1 else _one_hot(labels, logits.shape[1])


def _one_hot(indices: torch.Tensor, num: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(indices, num).bool()


def _same(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Bool N: whether the same classes are chosen."""
    return (found == expected).all(dim=1)


def _macro_f1(chosen: torch.Tensor, true: torch.Tensor) -> float:
    """The mean over the classes that occur or are chosen, as validation has it."""
    hits, both = (chosen & true).sum(dim=0).double(), (chosen.sum(dim=0) + true.sum(dim=0)).double()
    return (2 * hits[both > 0] / both[both > 0]).mean().item()


def rejection(row: Mapping[str, Any], post: PostConfig, *, is_quantized: bool, num: int) -> str | None:
    """Why an export that compares with the checkpoint like this is not accepted, or None."""
    reasons = []
    low, high = row["top1_drop_interval"]
    if low > post.max_top1_drop + 1e-9:
        reasons.append(
            f"loses {row['top1_drop']:.2f} points of top-1 (95 % interval {low:.2f} to {high:.2f}); post.max_top1_drop "
            f"allows {post.max_top1_drop:g}"
        )
    least = post.min_agreement if is_quantized else max(MIN_AGREEMENT, post.min_agreement)
    if row["agreement"] < least - 1e-9:
        key = "post.min_agreement" if least == post.min_agreement else "a float32 export"
        reasons.append(
            f"agrees with the checkpoint on {row['agreement']:.2%} of the images ({row['num_changed']} of {num} "
            f"answers changed); {key} asks for {100 * least:g}%"
        )
    return "; ".join(reasons) or None


def doubt(row: Mapping[str, Any], post: PostConfig, *, num: int) -> str | None:
    """What so many images cannot say of an export: whether it loses more than it may; None: they can, or no need."""
    if not row["num_changed"]:
        return None
    low, high = row["top1_drop_interval"]
    if not low <= post.max_top1_drop < high:
        return None
    return (
        f"{num} images are too few to say whether it loses more than {post.max_top1_drop:g} points "
        f"(95 % interval {low:.2f} to {high:.2f})"
    )
