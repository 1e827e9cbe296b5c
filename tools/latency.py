"""Measures the time for one image. Models take turns, so that other load on the machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.tools.evaluate import Predictor

WARM_UP_RUNS = 5
"""Untimed runs of each model at first: memory is allocated, TorchScript compiles."""
NUM_TURNS = 10
RUNS_A_TURN = 5
"""Timed runs in a turn, after an untimed one that brings the model's weights into the caches."""
PAUSE_S = 0.01
"""Seconds between two turns: the last model's threads spin for some milliseconds before they sleep."""


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
        order = [*order[1:], order[0]]  # so that each model follows each other one in some turn
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
