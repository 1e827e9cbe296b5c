"""How sure a figure is that was measured on few images: 95 % intervals, and what is no more than noise.

A fraction of images has Wilson's interval. What follows from the answers to all images, as F1 does, has that of the
bootstrap: images are drawn anew, as many as there are, and the figure is computed of each draw.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from launcher.recipe.metrics import Counts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from launcher.recipe.metrics import Metric

Z_95 = 1.959964
"""A 95 % interval reaches this many standard deviations to either side."""
DRAWS = 200
"""Of a bootstrap: enough for the first two digits of a deviation."""
MOST_IMAGES = 10_000
"""Of more images the intervals are narrow, and are left out."""
FRACTIONS = ("top1", "top5", "exact_match")
"""Metrics that are a fraction of images."""

Json = dict[str, Any]


def wilson_interval(fraction: float, samples: int) -> tuple[float, float]:
    """95 % interval of a fraction measured on ``samples`` images (score interval: Wilson, JASA 22, 1927)."""
    squared = Z_95 * Z_95
    centre = (fraction + squared / (2 * samples)) / (1 + squared / samples)
    half = Z_95 / (1 + squared / samples) * math.sqrt(fraction * (1 - fraction) / samples + squared / (4 * samples**2))
    return centre - half, centre + half


def of_validation(line: Json, table: Mapping[str, Metric]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the metrics of a line of metrics.jsonl that can have one; none of many images."""
    samples = line.get("samples") or 0
    if not 0 < samples <= MOST_IMAGES:
        return {}
    found = {name: wilson_interval(line[name], samples) for name in FRACTIONS if line.get(name) is not None}
    names = [name for name, metric in table.items() if metric.of_answers and line.get(name) is not None]
    matrix = line.get("confusion")
    if matrix and (drawn := [name for name in names if name not in found]):
        found |= _of_matrix(matrix, {name: table[name] for name in drawn})
    return {name: found[name] for name in table if name in found}


def _of_matrix(matrix: list[list[int]], table: Mapping[str, Metric]) -> dict[str, tuple[float, float]]:
    import numpy as np

    cells = np.array(matrix)
    true, predicted = np.nonzero(cells)
    values = draw(
        cells[true, predicted],
        lambda counts: [_value(metric, counts, true, predicted, len(cells)) for metric in table.values()],
    )
    low, high = np.percentile(values, [2.5, 97.5], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(table)}


def draw(counts: NDArray[Any], values: Callable[[NDArray[Any]], list[float]]) -> NDArray[Any]:
    """What ``values`` gives of each of DRAWS draws of as many images, of kinds that occur ``counts`` times."""
    import numpy as np

    num = int(counts.sum())
    drawn = np.random.default_rng(0).multinomial(num, counts / num, size=DRAWS)
    return np.array([values(each) for each in drawn])


def noise_of_gain(
    metric: Metric, true: NDArray[Any], before: NDArray[Any], now: NDArray[Any], counts: NDArray[Any]
) -> float:
    """By how much a metric may change between two models' answers to the same images by chance alone (95 %).

    Args:
        metric: one of answers.
        true: classes of the kinds of images that there are, from 0.
        before: the former answer to each kind.
        now: the new one.
        counts: how many images there are of each kind.
    """
    import numpy as np

    classes, places = np.unique(np.concatenate([true, before, now]), return_inverse=True)
    true, before, now = np.split(places.reshape(-1), 3)  # of classes that do not occur nothing follows

    def gain(drawn: NDArray[Any]) -> list[float]:
        old, new = (_value(metric, drawn, true, answers, len(classes)) for answers in (before, now))
        return [new - old]

    return Z_95 * float(draw(counts, gain).std())


def _value(metric: Metric, counts: NDArray[Any], true: NDArray[Any], predicted: NDArray[Any], num: int) -> float:
    import numpy as np

    assert metric.value  # noqa: S101
    right = true == predicted
    totals = [
        np.bincount(of, weights=weights, minlength=num).tolist()
        for of, weights in ((true[right], counts[right]), (true, counts), (predicted, counts))
    ]
    names = dict(zip(("hits", "true", "predicted"), totals, strict=True))
    return metric.value(Counts(samples=int(counts.sum()), loss=0.0, top_k=0, **names))
