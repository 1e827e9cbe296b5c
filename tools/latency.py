"""Times models in turns, one image at a time and in batches: what slows the machine slows them all alike."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.tools.evaluate import Predictor

WARM_UP_RUNS = 3
"""Untimed runs of each model at first: memory is allocated, TorchScript compiles."""
NUM_TURNS = 10
MAX_RUNS_A_TURN = 20
"""Timed runs in a turn at most, after an untimed one that brings the model's weights into the caches."""
TURN_S = 0.1
"""Seconds that a model's timed runs of a turn may take; a slow one is run once."""
MODEL_S = 2.0
"""Seconds that all turns of a model may take: a slow one takes part in fewer, but in MIN_TURNS."""
MIN_TURNS = 3
PAUSE_S = 0.01
"""Seconds between two turns: the last model's threads spin for some milliseconds before they sleep."""
BATCHES = (4, 16, 32)
"""Batch sizes that are tried for the throughput, beside one image at a time."""
BATCH_TURNS = 3


@torch.inference_mode()
def measure(predictors: Mapping[str, Predictor], image_size: int, channels: int = 3) -> dict[str, dict[str, Any]]:
    """Milliseconds for one image (1 x C x S x S, random), by model.

    Returns:
        Each ``{latency_p50_ms, latency_p95_ms, latency_p99_ms, latency_iqr_ms, latency_runs}``: the median, two
        percentiles, the distance between the quartiles, and the number of timed runs.
    """
    image = _images(1, image_size, channels)
    times: dict[str, list[float]] = {name: [] for name in predictors}
    turns, runs = {}, {}
    for name, predictor in predictors.items():
        one_s = min(_run_ms(predictor, image) for _ in range(WARM_UP_RUNS)) / 1e3
        runs[name] = max(1, min(MAX_RUNS_A_TURN, int(TURN_S / max(one_s, 1e-6))))
        turns[name] = _spread(max(MIN_TURNS, min(NUM_TURNS, int(MODEL_S / max(one_s * (1 + runs[name]), 1e-6)))))
    order = list(predictors)
    for turn in range(NUM_TURNS):
        for name in order:
            if turn not in turns[name]:
                continue
            time.sleep(PAUSE_S)
            predictors[name](image)
            times[name] += [_run_ms(predictors[name], image) for _ in range(runs[name])]
        order = [*order[1:], order[0]]  # so that each model follows each other one in some turn
    return {name: _summary(found) for name, found in times.items()}


@torch.inference_mode()
def throughput(
    predictors: Mapping[str, Predictor], image_size: int, channels: int = 3, batches: Sequence[int] = BATCHES
) -> dict[str, dict[str, Any]]:
    """How many images a second each model computes, in turns, at the batch size that is best for it.

    Returns:
        Each ``{throughput_images_per_s, throughput_batch}``.
    """
    fastest: dict[str, dict[str, Any]] = {name: {"throughput_images_per_s": 0.0} for name in predictors}
    for batch in batches:
        images = _images(batch, image_size, channels)
        times: dict[str, list[float]] = {name: [] for name in predictors}
        for turn in range(BATCH_TURNS + 1):  # the first one warms up
            for name, predictor in predictors.items():
                time.sleep(PAUSE_S)
                took = _run_ms(predictor, images)
                times[name] += [took] if turn else []
        for name, found in times.items():
            rate = 1e3 * batch / statistics.median(found)
            if rate > fastest[name]["throughput_images_per_s"]:
                fastest[name] = {"throughput_images_per_s": rate, "throughput_batch": batch}
    return fastest


def _images(num: int, size: int, channels: int) -> torch.Tensor:
    return torch.rand(num, channels, size, size, generator=torch.Generator().manual_seed(0))


def _spread(num: int) -> set[int]:
    """So many of the turns, spread evenly over all of them."""
    return {turn * NUM_TURNS // num for turn in range(num)}


def _run_ms(predictor: Predictor, image: torch.Tensor) -> float:
    start = time.perf_counter()
    predictor(image)
    return (time.perf_counter() - start) * 1e3


def _summary(times: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    percentiles = statistics.quantiles(times, n=100, method="inclusive")
    return {
        "latency_p50_ms": median,
        "latency_p95_ms": percentiles[94],
        "latency_p99_ms": percentiles[98],
        "latency_iqr_ms": high - low,
        "latency_runs": len(times),
    }
