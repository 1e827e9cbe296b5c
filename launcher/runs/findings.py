"""What is suspicious about a model that has been trained, each with its likely cause.

The terminal, the report, the model card and `launch why` all tell what :func:`of_run` finds.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.images.folder import printable
from launcher.system.files import read_jsonl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.runs.run_dir import RunDir

Json = dict[str, Any]

MIN_IMAGES = 10
"""With fewer validation images, find nothing: they prove nothing."""
MIN_OTHERS = 3
"""Validation images of other classes that are needed to see that a model answers one class only."""
NEARLY_ALL = 0.9
"""A class that takes at least this share of all answers takes "nearly all"."""
MISSED = 0.8
"""… if it also takes at least this share of the other classes' images: a class that is most of the validation images
may rightly be most of the answers."""
NEAR_CHANCE = 0.1
"""Share of the way from chance to no mistakes (Cohen's kappa) up to which a model counts as no better than chance …"""
SIGMAS = 3.0
"""… if its top-1 is also within so many standard errors of chance: 1 % of 1,000 classes is ten times chance."""
GAP = 0.4
"""Report a gap if top-1 in training exceeds top-1 in validation by this; half of it is common with few images."""
WINDOW_IMAGES = 100
"""Measure top-1 in training on at least the last 100 images."""
SWAPPED, SWAPPED_IMAGES = 0.8, 5
"""Folders count as mixed up if at least this share of a class's images, of at least 5, is taken for another class."""
LEARNED = 0.2
"""A model has learned something if top-1 in training exceeds chance by this."""
FEW_STEPS = 100
"""With fewer optimizer steps, the likeliest cause is that training was too short."""
FEW_IMAGES, IMBALANCE = 10, 10.0
"""A class is rare with fewer than 10 training images, or with 10 times fewer than the median class."""
NUM_SHOWN = 10
"""A line names at most this many classes."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to look at before the model is used."""

    kind: str
    """mixed_up, one_class, chance or gap."""
    message: str
    """What was measured."""
    cause: str
    """Its likely cause, and what to do."""

    def __str__(self) -> str:
        return f"{self.message}; likely cause: {self.cause}"


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """How a model's answers lie on the validation images."""

    num: int
    """Images."""
    top1: float
    """Share of right answers."""
    chance: float
    """Top-1 of the same answers, had they been given to images at random."""
    most: str
    """The class that is answered most often."""
    count: int
    """How often it is."""
    true: int
    """Images of that class."""
    hits: int
    """Of these, those that are answered so."""

    @property
    def is_one_class(self) -> bool:
        """Whether one class takes nearly all answers, those to images of other classes included."""
        others = self.num - self.true
        return (
            others >= MIN_OTHERS and self.count >= NEARLY_ALL * self.num and self.count - self.hits >= MISSED * others
        )

    @property
    def is_chance(self) -> bool:
        """Whether the answers have little or nothing to do with the images."""
        above, error = self.top1 - self.chance, math.sqrt(self.chance * (1 - self.chance) / self.num)
        return above < NEAR_CHANCE * (1 - self.chance) and above < SIGMAS * error


def of_run(run: RunDir) -> list[Finding]:
    """What is suspicious about a run's best checkpoint; nothing if there is no validation, or with --debug."""
    status, lines = run.read_status(), [line for line in read_jsonl(run.metrics) if isinstance(line, dict)]
    train, val = (_by_step(lines, split) for split in ("train", "val"))
    best = val.get((status.get("best") or {}).get("step", -1))
    if best is None or run.read_plan().debug:
        return []
    return find(best, [*val.values()][-1], list(train.values()))


def find(best: Json, final: Json, train: Sequence[Json]) -> list[Finding]:
    """What is suspicious about a model.

    Args:
        best: its validation, a line of metrics.jsonl.
        final: the run's last validation.
        train: windows of training, oldest first.
    """
    if best["samples"] < MIN_IMAGES:
        return []
    if mixed_up := _mixed_up(best):
        return [mixed_up]
    learned, answers = _training_top1(train), _answers(best)
    if answers and (answers.is_one_class or answers.is_chance):
        return [_no_better_than_chance(answers, learned, final["step"])]
    reached = max(best["top1"], final["top1"])
    if learned is not None and learned - reached >= GAP:
        return [
            Finding(
                kind="gap",
                message=f"top-1 is {learned:.3f} in training and {reached:.3f} in validation",
                cause="the training images are learned by heart (more of them, data.augment, model.freeze or fewer "
                "epochs), or those of val/ differ from those of train/: another source, or sorted differently",
            )
        ]
    return []


def rare_classes(counts: Mapping[str, int]) -> dict[str, int]:
    """Classes with few training images, by themselves or beside the others; the fewest first."""
    if not counts:
        return {}
    least = max(FEW_IMAGES, statistics.median(counts.values()) / IMBALANCE)
    return dict(sorted((item for item in counts.items() if item[1] < least), key=lambda item: item[1]))


def describe_rare(rare: Mapping[str, int]) -> str:
    """One line: which classes have how many training images."""
    shown = ", ".join(f"{printable(name)} ({count})" for name, count in [*rare.items()][:NUM_SHOWN])
    more = f" and {len(rare) - NUM_SHOWN} more classes" if len(rare) > NUM_SHOWN else ""
    return f"few training images of {shown}{more}: expect little where they are concerned"


def _no_better_than_chance(answers: _Answers, learned: float | None, num_steps: int) -> Finding:
    """A finding that a model is no better than chance, with the cause that fits its training best."""
    if answers.is_one_class:
        message = (
            f"{answers.count} of {answers.num} validation images are taken for {_quoted(answers.most)}, and "
            f"{answers.true} are (top-1 {answers.top1:.3f})"
        )
    else:
        message = (
            f"no better than chance: top-1 is {answers.top1:.3f} on {answers.num} validation images, and the same "
            f"answers given at random would have {answers.chance:.3f}"
        )
    if learned is not None:
        message += f", while training reached {learned:.3f}"
    return Finding(
        kind="one_class" if answers.is_one_class else "chance",
        message=message,
        cause=_cause_of_chance(answers, learned, num_steps),
    )


def _cause_of_chance(answers: _Answers, learned: float | None, num_steps: int) -> str:
    if learned is not None and learned - answers.chance >= LEARNED:
        return (
            "what was learned does not reach validation: BatchNorm's running statistics, where the network has them "
            "(few steps, or small batches: more epochs, a larger batch.size), or images in val/ that differ from those "
            "in train/ or are sorted differently"
        )
    if num_steps < FEW_STEPS:
        return f"training was short, {num_steps} steps: raise train.epochs, or lower batch.size for more steps an epoch"
    return (
        "it has not learned: optim.lr is too high or too low, too much is frozen (model.freeze), one class is most of "
        "the training images, or the folders of train/ have nothing to do with what their images show"
    )


def _quoted(name: str) -> str:
    return f"'{printable(name)}'"


def _by_step(lines: Sequence[Json], split: str) -> dict[int, Json]:
    """Lines of a split, by step: after a crash and a resume steps come again, and the last line counts."""
    found = {line["step"]: line for line in lines if line.get("split") == split}
    return dict(sorted(found.items()))


def _training_top1(train: Sequence[Json]) -> float | None:
    """Over the last windows of training; None: there was none."""
    hits = num = 0.0
    for line in reversed(train):
        hits, num = hits + line["top1"] * line["samples"], num + line["samples"]
        if num >= WINDOW_IMAGES:
            break
    return hits / num if num else None


def _answers(val: Json) -> _Answers | None:
    """From the confusion matrix, or from its summary where there are too many classes; None: there is neither."""
    num = val["samples"]
    if summary := val.get("answers"):
        return _Answers(num=num, top1=val["top1"], **summary)
    matrix = val.get("confusion")
    if not matrix:
        return None
    true, predicted = [sum(row) for row in matrix], [sum(column) for column in zip(*matrix, strict=True)]
    if num - max(true) < MIN_OTHERS:  # all of one class: any answers look like chance
        return None
    most = max(range(len(predicted)), key=predicted.__getitem__)
    return _Answers(
        num=num,
        top1=val["top1"],
        chance=sum(t * p for t, p in zip(true, predicted, strict=True)) / num**2,
        most=list(val["per_class"])[most],
        count=predicted[most],
        true=true[most],
        hits=matrix[most][most],
    )


def _mixed_up(val: Json) -> Finding | None:
    """Classes whose images are taken for one another in a ring."""
    matrix = val.get("confusion") or []
    target = {
        index: other
        for index, row in enumerate(matrix)
        for other, count in enumerate(row)
        if other != index and sum(row) >= SWAPPED_IMAGES and count >= SWAPPED * sum(row)
    }
    rings = [index for index in target if _returns(index, target)]
    if not rings:
        return None
    names = [_quoted(name) for name in val["per_class"]]
    pairs = [f"{names[index]} for {names[target[index]]}" for index in rings]
    more = f" and {len(pairs) - NUM_SHOWN} more classes" if len(pairs) > NUM_SHOWN else ""
    return Finding(
        kind="mixed_up",
        message="nearly all validation images of classes are taken for another one, and the other way round: "
        f"{', '.join(pairs[:NUM_SHOWN])}{more} (top-1 {val['top1']:.3f})",
        cause="the folders of these classes are mixed up in train/ or in val/: look into them",
    )


def _returns(start: int, target: dict[int, int]) -> bool:
    """Whether going from class to class leads back."""
    place = target.get(start)
    for _ in target:
        if place is None or place == start:
            break
        place = target.get(place)
    return place == start
