"""Models are timed in turns: what slows the machine for a while slows them all alike."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest

from launcher.tools import latency


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A machine that nothing else keeps busy: time goes by only where somebody sleeps."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep))


def sleeper(seconds, calls, name):
    def predict(_images):
        calls.append(name)
        latency.time.sleep(seconds())

    return predict


def test_each_model_follows_each_other_one_and_quick_ones_are_run_equally_often():
    calls: list[str] = []
    names = ("pytorch", "onnx", "int8")
    found = latency.measure({name: sleeper(lambda: 0.0, calls, name) for name in names}, 8)
    assert set(found) == set(names)
    num = latency.WARM_UP_RUNS + latency.NUM_TURNS * (1 + latency.MAX_RUNS_A_TURN)
    assert Counter(calls) == dict.fromkeys(names, num)
    timed = calls[len(names) * latency.WARM_UP_RUNS :]
    turns = [name for name, _ in itertools.groupby(timed)]
    assert {*itertools.pairwise(turns)} > {("pytorch", "onnx"), ("onnx", "int8"), ("int8", "pytorch")}


def test_a_slow_model_is_timed_a_few_times_only(monkeypatch):
    monkeypatch.setattr(latency, "MODEL_S", 0.2)
    calls: list[str] = []
    seconds = {"pytorch": 0.15, "onnx": 0.001}
    found = latency.measure({name: sleeper(lambda s=s: s, calls, name) for name, s in seconds.items()}, 8)
    assert Counter(calls)["pytorch"] == latency.WARM_UP_RUNS + 2 * latency.MIN_TURNS
    assert found["pytorch"]["latency_runs"] == latency.MIN_TURNS
    assert found["onnx"]["latency_runs"] > 50


def test_the_throughput_is_that_of_the_best_batch():
    def predict(images):
        latency.time.sleep(0.004 + (0.05 if len(images) > 16 else 0))

    (found,) = latency.throughput({"onnx": predict}, 8).values()
    assert found["throughput_batch"] == 16
    assert found["throughput_images_per_s"] == pytest.approx(4000)


def test_a_load_that_comes_and_goes_does_not_decide_which_is_faster():
    """From the middle on all takes four times as long: of models timed one after another that would hit one."""
    calls: list[str] = []

    def load():
        return 4.0 if len(calls) > 160 else 1.0

    found = latency.measure(
        {
            "slow": sleeper(lambda: 0.012 * load(), calls, "slow"),
            "fast": sleeper(lambda: 0.006 * load(), calls, "fast"),
        },
        8,
    )
    assert 160 < len(calls) < 320
    assert found["slow"]["latency_p50_ms"] / found["fast"]["latency_p50_ms"] == pytest.approx(2)
    for row in found.values():
        assert 0 < row["latency_p50_ms"] <= row["latency_p95_ms"]
        assert row["latency_iqr_ms"] > 0
