"""What is measured in validation: one row a metric, which all read that compute, watch, show or record metrics.

A row computes from what was counted over all ranks, so the result is the same at any world size. A row here is all that
a new metric of ours needs. A recipe adds its own rows (``metrics``), which are objects of torchmetrics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from launcher.errors import did_you_mean
from launcher.recipe.run_weights import AVERAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from launcher.recipe.schema import Recipe
    from launcher.recipe.schema_train import MetricConfig

TOP_K = 5
"""Of val/top5."""
RESERVED = {
    *("time", "split", "attempt", "epoch", "step", "samples", "offset", "lr", "grad_norm", "images_per_s"),
    *("per_class", "confusion", "mistakes", "answers", "best", "ranking", "examples"),
    *("slowest_rank", "slowest_behind"),
}
"""Other names in a line of metrics.jsonl."""

Mode = Literal["min", "max"]

ELSEWHERE = dict.fromkeys(("acc", "accuracy", "acc1", "top1_accuracy", "top_1"), "val/top1")
"""What other tools call a metric that can be watched."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was counted over the whole validation set, on all ranks."""

    samples: int
    """Images."""
    loss: float
    """Sum of the losses of all images."""
    top_k: int
    """Images whose class is among the TOP_K that the model ranks highest."""
    hits: Sequence[int]
    """Of each class, images that were predicted rightly."""
    true: Sequence[int]
    """Of each class, images."""
    predicted: Sequence[int]
    """Of each class, images that were taken for it."""
    first: int | None = None
    """Images whose likeliest class is right; None: as many as there are hits, each image having one class."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What probabilities say, not answers: auroc, average_precision and ece."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric."""

    title: str
    """What people read."""
    mode: Mode
    """Whether less or more of it is better."""
    value: Callable[[Counts], float] | None = None
    """From the counts; None: it is a recipe's own."""
    fraction: bool = False
    """Whether pages show it in percent."""
    charted: bool = False
    """Whether the report draws its curve."""
    in_training: bool = False
    """Whether windows of training are measured by it too, and say so at the terminal."""
    at_terminal: bool = False
    """Whether each validation's line at the terminal has it; another one is said where it is watched."""
    ranked: bool = False
    """Whether it follows from all probabilities, which are counted in bins where there are very many."""
    of_answers: bool = False
    """Whether it follows from each image's true and predicted class alone, so that images can be drawn anew."""
    more_classes_than: int = 0
    """With no more classes it is the same for every model: metrics.jsonl has it, and nothing shows it."""


def _part(some: float, all_of_it: float) -> float:
    """A quotient; 0 where there is nothing: no image has a class, which is so where images may have none."""
    return some / all_of_it if all_of_it else 0.0


def _f1s(counts: Counts) -> list[tuple[float, int]]:
    """F1 and images of each class that occurs or is predicted."""
    rows = zip(counts.hits, counts.true, counts.predicted, strict=True)
    return [(2.0 * hits / (true + predicted), true) for hits, true, predicted in rows if true + predicted]


def _f1(counts: Counts) -> float:
    values = [value for value, _ in _f1s(counts)]
    return _part(sum(values), len(values))


def _f1_micro(counts: Counts) -> float:
    return _part(2.0 * sum(counts.hits), sum(counts.true) + sum(counts.predicted))


def _f1_weighted(counts: Counts) -> float:
    rows = _f1s(counts)
    return _part(sum(value * true for value, true in rows), sum(true for _, true in rows))


def _precision(counts: Counts) -> float:
    """The mean over the classes that occur or are predicted; 0 of one that is never predicted."""
    rows = zip(counts.hits, counts.true, counts.predicted, strict=True)
    values = [hits / predicted if predicted else 0.0 for hits, true, predicted in rows if true + predicted]
    return _part(sum(values), len(values))


def _recall(counts: Counts) -> float:
    """The mean over the classes that occur."""
    values = [hits / true for hits, true in zip(counts.hits, counts.true, strict=True) if true]
    return _part(sum(values), len(values))


def _score(name: str) -> Callable[[Counts], float]:
    return lambda counts: counts.scores.get(name, math.nan)


METRICS: dict[str, Metric] = {
    "loss": Metric(
        title="loss",
        mode="min",
        value=lambda counts: counts.loss / counts.samples,
        charted=True,
        in_training=True,
        at_terminal=True,
    ),
    "top1": Metric(
        title="top-1",
        mode="max",
        value=lambda counts: (sum(counts.hits) if counts.first is None else counts.first) / counts.samples,
        fraction=True,
        charted=True,
        in_training=True,
        at_terminal=True,
        of_answers=True,
    ),
    "top5": Metric(
        title="top-5",
        mode="max",
        value=lambda counts: counts.top_k / counts.samples,
        fraction=True,
        at_terminal=True,
        more_classes_than=TOP_K,
    ),
    "f1": Metric(
        title="F1 (mean over classes)", mode="max", value=_f1, fraction=True, at_terminal=True, of_answers=True
    ),
    "f1_micro": Metric(title="F1 (all answers)", mode="max", value=_f1_micro, fraction=True, of_answers=True),
    "f1_weighted": Metric(title="F1 (by class size)", mode="max", value=_f1_weighted, fraction=True, of_answers=True),
    "precision": Metric(
        title="precision (mean over classes)", mode="max", value=_precision, fraction=True, of_answers=True
    ),
    "balanced_accuracy": Metric(
        title="balanced accuracy (mean recall)", mode="max", value=_recall, fraction=True, of_answers=True
    ),
    "auroc": Metric(title="AUROC (mean over classes)", mode="max", value=_score("auroc"), fraction=True, ranked=True),
    "average_precision": Metric(
        title="average precision (mAP)", mode="max", value=_score("average_precision"), fraction=True, ranked=True
    ),
    "ece": Metric(title="calibration error (ECE)", mode="min", value=_score("ece"), fraction=True),
}
"""Ours, by their names in metrics.jsonl, in the order in which they are shown."""


def own(rows: Any) -> dict[str, Metric]:
    """A recipe's own metrics by their names, as they stand in it or in a file; what makes no sense is left out."""
    found = {}
    for row in rows if isinstance(rows, list) else ():
        values = _values(row)
        reference, mode = values.get("metric"), values.get("mode", "max")
        if isinstance(reference, str) and mode in ("min", "max"):
            name = str(values.get("name") or name_of(reference))
            found[name] = Metric(title=name, mode=mode, charted=True)
    return {name: metric for name, metric in found.items() if name not in METRICS}


def _values(row: Any) -> dict[str, Any]:
    """A row as a mapping; it may be a reference alone, a mapping from a file, or a part of a recipe."""
    if isinstance(row, str):
        return {"metric": row}
    return row if isinstance(row, dict) else getattr(row, "__dict__", {})


def configs(rows: Sequence[str | MetricConfig]) -> dict[str, MetricConfig]:
    """A recipe's own metrics by their names, each as a whole row."""
    from launcher.recipe.schema_train import MetricConfig

    whole = [MetricConfig(metric=row) if isinstance(row, str) else row for row in rows]
    return {row.name or name_of(row.metric): row for row in whole}


def name_of(reference: str) -> str:
    """What a metric is called where the recipe does not say: ``MyMetric`` of ``my.py:MyMetric``."""
    return reference.rpartition(":")[2].rpartition(".")[2]


def of(rows: Any) -> dict[str, Metric]:
    """Ours and a recipe's own."""
    return METRICS | own(rows)


def watchable(rows: Any) -> dict[str, Mode]:
    """What early stopping can watch, each with the mode that means better."""
    return {"train/loss": METRICS["loss"].mode, **{f"val/{name}": metric.mode for name, metric in of(rows).items()}}


def nearest(found: str, valid: Collection[str]) -> str:
    """``did you mean 'val/top1'?`` for a metric that is not among the ``valid`` ones; empty where none is near."""
    known = ELSEWHERE.get(found.rpartition("/")[2].lower())
    return f"did you mean {known!r}?" if known in valid else did_you_mean(found, valid)


def trivial(num_classes: int) -> set[str]:
    """Metrics that are the same for every model with so few classes (0: not known)."""
    return {name for name, metric in METRICS.items() if 0 < num_classes <= metric.more_classes_than}


def trivial_in(line: Mapping[str, Any]) -> set[str]:
    """The same, by a line of metrics.jsonl."""
    classes = line.get("per_class")
    return trivial(len(classes) if isinstance(classes, dict) else 0)


def measure(recipe: Recipe, watched: str) -> str | None:
    """What the values of a watched metric are measured by, where a recipe says: its loss, or an object of its own."""
    from launcher.recipe import user_code

    name = watched.partition("/")[2]
    if name == "loss":
        return f"{user_code.as_in_run(recipe.train.loss)} {recipe.train.loss_args}"
    row = configs(recipe.metrics).get(name)
    return f"{user_code.as_in_run(row.metric)} {row.args}" if row else None


def find_problems(rows: Sequence[str | MetricConfig]) -> Iterator[tuple[str, str]]:
    """What is wrong with the names of a recipe's own metrics; keys, and words."""
    taken = {*METRICS, *RESERVED}
    for index, row in enumerate(rows):
        ((name, _),) = configs([row]).items()
        if name.startswith(tuple(f"{kind}_" for kind in AVERAGES)):
            yield f"metrics.{index}", f"the name {name!r} begins as those of averaged weights do; give it another"
        if name in taken:
            whose = "" if name in METRICS or name in RESERVED else " by another metric of this recipe"
            text = f"the name {name!r} is taken{whose}; give it another: {{name: my_{name}, metric: …}}"
            yield f"metrics.{index}", text
        taken.add(name)
