"""How long one image takes. Models take turns, so that what else the machine does meanwhile slows them all alike."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.tools.evaluate import Predictor

WARM_UP_RUNS = 5
"""Of each model before anything is timed: memory is allocated, TorchScript compiles."""
NUM_TURNS = 10
RUNS_A_TURN = 5
"""Timed runs; one that is not timed comes before them and brings the model's weights back into the caches."""
PAUSE_S = 0.01
"""Between two turns: threads of the model before spin for some milliseconds until they sleep."""


@torch.inference_mode()
def measure(predictors: Mapping[str, Predictor], image_size: int) -> dict[str, dict[str, float]]:
    """Milliseconds for one image (1 x 3 x S x S, random), by model.

    Returns:
        ``{latency_p50_ms, latency_p95_ms, latency_iqr_ms}`` each: the median, the 95th percentile and the distance
        between the quartiles.
    """
    image = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    for predictor in predictors.values():
        for _ in range(WARM_UP_RUNS):
            predictor(image)
    times: dict[str, list[float]] = {name: [] for name in predictors}
    order = list(predictors)
    for _ in range(NUM_TURNS):
        for name in order:
            time.sleep(PAUSE_S)
            predictors[name](image)
            times[name] += [_run_ms(predictors[name], image) for _ in range(RUNS_A_TURN)]
        order = [*order[1:], order[0]]  # each follows each other one now and then
    return {name: _summary(found) for name, found in times.items()}


def _run_ms(predictor: Predictor, image: torch.Tensor) -> float:
    start = time.perf_counter()
    predictor(image)
    return (time.perf_counter() - start) * 1e3


def _summary(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {
        "latency_p50_ms": median,
        "latency_p95_ms": statistics.quantiles(times, n=20)[-1],
        "latency_iqr_ms": high - low,
    }
