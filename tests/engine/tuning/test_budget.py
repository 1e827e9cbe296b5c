"""``batch.tune_budget``: a run measures for a share of the time that it will train, and a short one with two probes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.engine.tuning.batch_search import MAX_PROBES, BatchSearch
from launcher.engine.tuning.budget import LEAST_PROBES, Budget, Spending
from launcher.engine.tuning.probe import Probe

PEAK = 1000.0


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def search(*, images, share=0.05, probe_s=3.0, half=12, objective="throughput"):
    """On a device where each probe takes ``probe_s`` seconds; how it ended, what it spent, and its spending."""
    clock = Clock()

    def probe(size):
        return Probe(
            batch_size=size, images_per_s=PEAK * size / (half + size), memory_bytes=10**9 + size * 10**7, state_bytes=0
        )

    def measure(size, _beside):
        clock.now += probe_s
        return probe(size)

    def compare(sizes):
        clock.now += probe_s
        return [probe(size) for size in sizes]

    spending = Spending(Budget(share=share, images=images), objective=objective, clock=clock)
    found = BatchSearch(
        measure,
        compare=compare,
        needed=lambda one: one.memory_bytes,
        budget_bytes=8 * 10**9,
        objective=objective,
        max_size=4096,
        spending=spending,
    ).run()
    return found, clock.now, spending


@given(
    images=st.integers(1, 10**8),
    share=st.floats(0, 1),
    probe_s=st.floats(0.1, 60),
    half=st.floats(0.1, 200),
    objective=st.sampled_from(["throughput", "memory"]),
)
def test_no_more_is_spent_than_the_budget_but_for_the_least(images, share, probe_s, half, objective):
    found, spent, spending = search(images=images, share=share, probe_s=probe_s, half=half, objective=objective)
    speed = max(one.probe.images_per_s for one in found.attempts)
    least = LEAST_PROBES[objective]
    assert found.num_probes == spending.num_probes >= 1
    assert found.num_probes <= least or spent <= share * images / min(
        one.probe.images_per_s for one in found.attempts
    ) * (1 + 1e-9)
    if found.num_probes > least:
        assert share * images / speed > 0
    assert found.chosen.probe.images_per_s > 0
    assert any(one.batch_size == found.chosen.batch_size for one in found.attempts)


def test_a_short_run_takes_two_probes_and_says_so():
    found, spent, spending = search(images=40_000)  # 40 s at the peak: 5 % are 2 s
    assert (found.num_probes, spent) == (2, 6)
    assert found.chosen.batch_size > 8
    told = spending.told(found.chosen.batch_size)
    assert told == (
        f"batch size {found.chosen.batch_size} by 2 probes: 5 % of the run's estimated 55 s allow no more "
        "(batch.tune_budget)"
    )


def test_a_long_run_searches_as_ever():
    found, _, spending = search(images=10**8)
    clock = Clock()
    unbounded = Spending(None, clock=clock)
    assert unbounded.allows_more(1.0)
    assert spending.stopped_at is None
    assert 3 <= found.num_probes <= MAX_PROBES


@given(images=st.integers(1, 10**8), speed=st.floats(0.1, 10**5), share=st.floats(0, 1), spent=st.floats(0, 10**4))
def test_a_longer_run_may_spend_whatever_a_shorter_one_may(images, speed, share, spent):
    shorter, longer = (Budget(share=share, images=number) for number in (images, 2 * images))
    assert longer.turns_s(speed) == pytest.approx(2 * shorter.turns_s(speed))
    if shorter.allows(images_per_s=speed, spent_s=spent, next_s=1):
        assert longer.allows(images_per_s=speed, spent_s=spent, next_s=1)
        assert spent + 1 <= share * shorter.run_s(speed)


@pytest.mark.parametrize(
    ("cut_for_s", "images", "served"), [(None, 10**9, True), (100, 100, True), (100, 149, True), (100, 1000, False)]
)
def test_what_a_short_run_found_is_not_for_a_long_one(cut_for_s, images, served):
    kept = {"images_per_s": 1.0, "cut_for_s": cut_for_s}
    assert Budget(share=0.05, images=images).is_served_by(kept) is served
    assert Budget(share=0.05, images=images).is_served_by({"images_per_s": 1.0})
