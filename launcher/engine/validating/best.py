"""What people want to see of the best checkpoint's validation: its classes, its calibration, and single images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.distributed import count_over_ranks, gather_rows
from launcher.engine.schedule import validation_batches
from launcher.engine.validating import redraw
from launcher.engine.validating.several import NUM_IMAGES
from launcher.engine.validating.totals import MAX_DETAILED_CLASSES

if TYPE_CHECKING:
    from launcher.engine.listeners.recorder import Recorder
    from launcher.engine.setup import Parts
    from launcher.engine.validating.noise import Answers
    from launcher.engine.validating.several import SeveralAnswers

VERSION = 1
NUM_CONFUSIONS = 200
"""Pairs of classes that are kept, the most frequent."""


class BestValidation:
    """Describes each best epoch's answers. Every rank has one.

    Args:
        parts: model, data and who we are.
        recorder: on rank 0.
    """

    def __init__(self, parts: Parts, recorder: Recorder | None) -> None:
        self._parts = parts
        self._recorder = recorder
        self._trained_on: dict[str, int] = {}

    def take(self, best: dict[str, Any], answers: Answers | None) -> None:
        """Write down what rank 0 learns of all ranks' answers. Every rank must call it.

        Args:
            best: as status.json has it.
            answers: of the weights that it is the value of.
        """
        if answers is None:
            return
        intervals = redraw.intervals(answers.scores, wanted=self._recorder is not None)
        if answers.several:
            self._take_several(best, answers, answers.several, intervals)
        if not answers.num_classes or answers.confidences is None:
            return
        num, pairs = answers.num_classes, answers.pairs
        right = pairs // num == pairs % num
        wrong, sure = (self._images(answers, ~right), self._images(answers, right))
        kinds, counts = (found.cpu() for found in count_over_ranks(pairs))
        if self._recorder is None:
            return
        true, predicted, hit = kinds // num, kinds % num, kinds // num == kinds % num
        names = self._parts.classes
        columns = [
            torch.zeros(num, dtype=torch.int64).index_add_(0, of, found)
            for of, found in ((true[hit], counts[hit]), (true, counts), (predicted, counts))
        ]
        most = counts[~hit].argsort(descending=True, stable=True)[:NUM_CONFUSIONS]
        rows = zip(*(each[~hit][most].tolist() for each in (true, predicted, counts)), strict=True)
        self._recorder.best_validation(
            {
                **_head(best, int(counts.sum())),
                "intervals": intervals,
                "classes": self._classes(*columns),
                "precision_recall": self._curves(answers.curves),
                "roc": self._curves(answers.roc),
                "calibration": answers.calibration,
                "confusions": [{"true": names[t], "predicted": names[p], "count": count} for t, p, count in rows],
                "wrong": self._named(wrong),
                "right": self._named(sure),
            }
        )

    def _take_several(
        self, best: dict[str, Any], answers: Answers, several: SeveralAnswers, intervals: dict[str, list[float]]
    ) -> None:
        """The same of any number of classes an image: nothing is taken for something else."""
        wrong, right = several.surest.gather(self._indices())
        if self._recorder is None:
            return
        self._recorder.best_validation(
            {
                **_head(best, answers.samples),
                "intervals": intervals,
                "classes": self._classes(*several.counts),
                "precision_recall": self._curves(answers.curves),
                "roc": self._curves(answers.roc),
                "calibration": answers.calibration,
                "confusions": [],
                "wrong": self._named_several(wrong),
                "right": self._named_several(right),
            }
        )

    def _classes(self, hits: torch.Tensor, true: torch.Tensor, predicted: torch.Tensor) -> dict[str, dict[str, int]]:
        """Of each class images that it was trained on, of validation, rightly predicted, and taken for it."""
        self._trained_on = self._trained_on or self._parts.images_per_class
        rows = zip(self._parts.classes, true.tolist(), hits.tolist(), predicted.tolist(), strict=True)
        return {
            name: {"train": self._trained_on.get(name, 0), "val": val, "hits": right, "predicted": said}
            for name, val, right, said in rows
        }

    def _curves(self, curves: torch.Tensor | None) -> dict[str, Any] | None:
        """The mean over the classes whose curve is known, and up to 100 classes that of each."""
        if curves is None:
            return None
        known = curves.isfinite().all(dim=1)
        rows = zip(self._parts.classes, curves.tolist(), known.tolist(), strict=True)
        shown = {name: [round(value, 4) for value in row] for name, row, is_known in rows if is_known}
        mean = [round(value, 4) for value in curves[known].mean(dim=0).tolist()] if known.any() else []
        return {"mean": mean, "classes": shown if len(curves) <= MAX_DETAILED_CLASSES else {}}

    def _indices(self) -> list[int]:
        """This rank's images of the validation set, in the order in which they are measured."""
        ranks, batching = self._parts.ranks, self._parts.schedule.batching
        of_rank = validation_batches(len(self._parts.val_set), rank=ranks.rank, batching=batching)
        return [index for batch in of_rank for index in batch]

    def _images(self, answers: Answers, wanted: torch.Tensor) -> torch.Tensor:
        """The surest of all ranks' answers of those wanted: rows of index, pair and confidence."""
        assert answers.confidences is not None  # noqa: S101  looked at before
        indices = self._indices()
        sure = answers.confidences.double().masked_fill(~wanted, -1.0)
        most = sure.topk(min(NUM_IMAGES, len(sure)))
        rows = torch.stack(
            [
                torch.tensor(indices[: len(sure)], dtype=torch.float64, device=sure.device)[most.indices],
                answers.pairs[most.indices].double(),
                most.values,
            ],
            dim=1,
        )
        rows = gather_rows(rows[most.values >= 0])
        return rows[rows[:, 2].argsort(descending=True, stable=True)[:NUM_IMAGES]]

    def _named(self, rows: torch.Tensor) -> list[dict[str, Any]]:
        """Rows of :meth:`_images` in words."""
        names, found = self._parts.classes, self._parts.val_set
        return [
            {"image": found.key(int(index)), "confidence": round(confidence, 6)}
            | {"true": names[int(pair) // len(names)], "predicted": names[int(pair) % len(names)]}
            for index, pair, confidence in rows.tolist()
        ]

    def _named_several(self, rows: torch.Tensor) -> list[dict[str, Any]]:
        """Rows of :class:`Surest` in words."""
        names, found = self._parts.classes, self._parts.val_set
        named = []
        for index, confidence, *has in rows.tolist():
            said, true = (
                [name for name, one in zip(names, part, strict=True) if one]
                for part in (has[: len(names)], has[len(names) :])
            )
            image = {"image": found.key(int(index)), "confidence": round(confidence, 6)}
            named.append(image | {"true": true, "predicted": said})
        return named


def _head(best: dict[str, Any], samples: int) -> dict[str, Any]:
    return {"version": VERSION, **{key: best[key] for key in ("metric", "value", "epoch", "step")}, "samples": samples}
