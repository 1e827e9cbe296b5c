"""What is counted in validation where an image has any number of classes, exact over ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.distributed import any_rank, sum_over_ranks
from launcher.engine.losses import sigmoids
from launcher.engine.metrics import hits_of
from launcher.engine.validating.noise import Answers
from launcher.engine.validating.ranking import Calibration, Ranking, error_of, in_images, mean_of
from launcher.engine.validating.redraw import scores_of
from launcher.engine.validating.several import Picked, SeveralAnswers, Surest
from launcher.engine.validating.totals import MAX_DETAILED_CLASSES, ClassTotals, per_class, values_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from launcher.engine.losses import Loss
    from launcher.engine.user.metrics import UserMetrics


class MultiLabelTotals:
    """Counts of a rank over its share of the validation set; all ranks' together on :meth:`compute`.

    An image is said to have each class whose probability reaches the threshold. ``top1`` and ``top5`` are the images
    whose likeliest class, or one of whose five likeliest classes, is one of theirs.

    Args:
        classes: names, in the order of the logits.
        device: where logits will be.
        loss: of the run.
        own: the recipe's own metrics.
        threshold: ``data.threshold``.
        picked: places of images, in this rank's share, of which the answer is kept.
    """

    def __init__(
        self,
        classes: Sequence[str],
        device: torch.device,
        loss: Loss,
        own: UserMetrics | None = None,
        *,
        threshold: float,
        picked: Collection[int] = (),
    ) -> None:
        self._classes = list(classes)
        self._of_run = loss
        self._gives_means = False
        """Whether the loss does on any rank, which one without images cannot see; known after :meth:`compute`."""
        self._own = own
        if own:
            own.reset()
        self._threshold = threshold
        self._losses = [torch.empty(0, dtype=torch.float64, device=device)]
        self._images = torch.zeros(3, dtype=torch.int64, device=device)
        """All, and those of top-1 and of top-5."""
        self._hits: list[torch.Tensor] = []
        """Of each batch, whether its images are of top-1 and of top-5; bool N x 2."""
        self._counts = torch.zeros(3, len(self._classes), dtype=torch.int64, device=device)
        """Of each class, images that rightly were said to have it, that have it, that were said to."""
        self._ranking = Ranking(len(self._classes), device)
        self._calibration = Calibration(device)
        self._surest = Surest(len(self._classes), device)
        self._picked = Picked(picked)
        self._counted: tuple[ClassTotals, list[list[int]]] | None = None
        """All ranks' counts of classes and of confidences; known after :meth:`compute`."""

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count a batch of logits (N x C) and which classes are true (N x C)."""
        self._losses.append(self._of_run.each(logits, targets))
        probabilities, true = sigmoids(logits), targets > 0
        said = probabilities >= self._threshold
        self._images[0] += len(targets)
        hits = hits_of(logits, targets)
        self._hits.append(hits.bool())
        self._images[1:] += hits.sum(dim=0).long()
        self._counts += torch.stack([(said & true).sum(0), true.sum(0), said.sum(0)])
        self._ranking.add(probabilities, targets)
        self._calibration.add(probabilities.flatten(), true.flatten())
        self._surest.add(probabilities, said, true)
        self._picked.add(probabilities, said)
        if self._own:
            self._own.add(logits, targets)

    def answers(self, share: Any, samples: int) -> Answers:
        """The losses of this rank's images, image by image, as of one class an image; and the surest of its answers."""
        assert self._counted  # noqa: S101  by compute()
        totals, bins = self._counted
        several = SeveralAnswers(
            counts=torch.stack([totals.hits, totals.true, totals.predicted]),
            surest=self._surest,
            picked=self._picked.rows,
        )
        losses = None if self._gives_means else torch.cat(self._losses)
        none = torch.empty(0, dtype=torch.int64)
        of_rank = Answers(share=share, samples=samples, num_classes=0, pairs=none, losses=losses)
        curves, roc = self._ranking.curves, self._ranking.roc
        scores = scores_of(self._ranking, self._hits, samples, threshold=self._threshold)
        return replace(of_rank, calibration=in_images(bins), curves=curves, roc=roc, several=several, scores=scores)

    def compute(self) -> dict[str, Any]:
        """``samples`` of all ranks, the value of every metric, and up to 100 classes ``per_class``."""
        self._gives_means = any_rank(self._of_run.gives_means, self._images.device)
        loss = float(sum_over_ranks(torch.cat(self._losses).sum()))
        samples, first, top_k = sum_over_ranks(self._images.clone()).tolist()
        hits, true, predicted = sum_over_ranks(self._counts.clone()).cpu()
        totals = ClassTotals(hits=hits, true=true, predicted=predicted)
        ranking, auroc, precision = self._ranking.compute()
        bins = self._calibration.bins()
        self._counted = totals, bins
        scores = {"auroc": mean_of(auroc), "average_precision": mean_of(precision), "ece": error_of(bins)}
        result: dict[str, Any] = {"samples": samples, **values_of(totals, samples, loss, top_k, scores, first=first)}
        result |= self._own.compute() if self._own else {}
        result["ranking"] = ranking
        if len(self._classes) > MAX_DETAILED_CLASSES:
            return result
        rows = per_class(totals, self._classes)
        for row, value, images in zip(rows.values(), precision.tolist(), true.tolist(), strict=True):
            row["average_precision"] = value if images else 0.0
        return result | {"per_class": rows}
