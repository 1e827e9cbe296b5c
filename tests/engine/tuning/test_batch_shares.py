from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.engine.schedule import Schedule, split_by_shares
from launcher.engine.tuning.batch_shares import RankBatch, deal


def rank(images_per_s, batch_size=64, max_size=10_000, device="H100"):
    return RankBatch(device=device, batch_size=batch_size, max_size=max_size, images_per_s=images_per_s)


@st.composite
def ranks(draw, *, max_size=3000):
    """Of any kinds, speeds and memories."""
    most = draw(st.integers(1, max_size))
    return RankBatch(
        device=draw(st.sampled_from(["H100", "A100", "T4"])),
        batch_size=draw(st.integers(1, most)),
        max_size=most,
        images_per_s=draw(st.floats(0.5, 20_000)),
    )


RANKS = st.lists(ranks(), min_size=1, max_size=6)
GLOBAL_SIZES = st.one_of(st.none(), st.integers(1, 5000))


@given(
    speeds=st.lists(st.floats(1000, 1060), min_size=2, max_size=8),
    sizes=st.lists(st.sampled_from([48, 56, 64, 128]), min_size=8, max_size=8),
)
def test_equal_devices_that_measured_a_little_differently_get_the_same(speeds, sizes):
    found = [rank(speed, size) for speed, size in zip(speeds, sizes, strict=False)]
    largest = max(one.batch_size for one in found)
    dealt = deal(found, global_size=None, accumulate=1)
    assert dealt.batch_sizes == dealt.shares == (largest,) * len(found)
    assert len(set(deal(found, global_size=500, accumulate=1).shares)) == 1


def test_different_devices_get_what_they_measured_however_near_that_is():
    dealt = deal([rank(1000), rank(1060, device="H200")], global_size=1000, accumulate=1)
    assert dealt.shares[0] / dealt.shares[1] == pytest.approx(1000 / 1060, rel=0.002)


def test_80_gb_and_40_gb_of_half_the_speed():
    dealt = deal(
        [rank(2500, 512, 872, "H100 80 GB"), rank(1250, 256, 424, "A100 40 GB")], global_size=None, accumulate=1
    )
    assert dealt.batch_sizes == dealt.shares == (512, 256)
    assert dealt.global_batch_size == 768


def test_the_faster_one_fills_the_time_that_the_slowest_needs_for_its_best_batch():
    dealt = deal([rank(3000, 64), rank(1000, 64, device="T4")], global_size=None, accumulate=1)
    assert dealt.batch_sizes == (192, 64)


@pytest.mark.parametrize("num", [2, 3, 5])
def test_a_rank_of_half_the_speed_gets_half_also_among_equal_devices(num):
    found = [*[rank(1000) for _ in range(num - 1)], rank(500)]
    assert deal(found, global_size=None, accumulate=1).batch_sizes == (*[128] * (num - 1), 64)
    dealt = deal(found, global_size=1000, accumulate=1)
    assert {share / dealt.shares[-1] for share in dealt.shares[:-1]} == {2}


def test_a_rank_with_little_memory_keeps_to_it_and_the_others_do_not_wait_for_it():
    found = [rank(2000, 512, 900), rank(1900, 128, 128, "T4")]
    dealt = deal(found, global_size=None, accumulate=1)
    assert (dealt.shares, dealt.batch_sizes) == ((512, 480), (512, 128))  # 486 would be no multiple of 8
    dealt = deal(found, global_size=1000, accumulate=1)
    assert dealt.batch_sizes == (512, 128)
    assert dealt.shares[1] / dealt.shares[0] == pytest.approx(0.95, rel=0.002)  # in more batches


@pytest.mark.parametrize("accumulate", [1, 3])
def test_without_a_global_size_it_is_the_sum_as_often_as_it_is_accumulated(accumulate):
    dealt = deal([rank(1000, 64), rank(500, 64)], global_size=None, accumulate=accumulate)
    assert dealt.global_batch_size == (128 + 64) * accumulate
    plan = Schedule(seed=0, num_samples=5 * 192 * accumulate, batching=dealt)
    step = next(plan.steps(0, epoch=0, offset=0, end_epoch=1))
    assert [len(batch) for batch in step.micro_batches] == [128] * accumulate


@given(found=RANKS, global_size=st.integers(1, 5000), accumulate=st.integers(1, 4))
def test_a_global_size_is_kept_and_each_rank_has_the_batches_best_for_it(found, global_size, accumulate):
    dealt = deal(found, global_size=global_size, accumulate=accumulate)
    assert dealt.global_batch_size == global_size
    assert dealt.batch_sizes == tuple(one.batch_size for one in found)
    slices = split_by_shares(global_size, dealt.shares)
    assert sum(end - start for start, end in slices) == global_size


@given(found=RANKS, global_size=GLOBAL_SIZES, accumulate=st.integers(1, 4))
def test_each_rank_takes_something_and_never_more_than_it_has_memory_for(found, global_size, accumulate):
    dealt = deal(found, global_size=global_size, accumulate=accumulate)
    assert len(dealt.batch_sizes) == len(dealt.shares) == len(found)
    assert all(1 <= size <= one.max_size for size, one in zip(dealt.batch_sizes, found, strict=True))
    assert all(isinstance(number, int) and number >= 1 for number in (*dealt.batch_sizes, *dealt.shares))
    if global_size is None:
        assert dealt.global_batch_size == sum(dealt.shares) * accumulate


@settings(max_examples=12)  # a rank a thousand times faster than another makes steps of many thousand samples
@given(found=st.lists(ranks(max_size=60), min_size=1, max_size=5), global_size=st.one_of(st.none(), st.integers(1, 90)))
def test_every_sample_of_a_step_is_dealt_once_in_batches_no_larger_than_the_ranks(found, global_size):
    dealt = deal(found, global_size=global_size, accumulate=2)
    plan = Schedule(seed=0, num_samples=2 * dealt.global_batch_size + 7, batching=dealt)
    steps = [list(plan.steps(r, epoch=0, offset=0, end_epoch=1)) for r in range(len(found))]
    for together in zip(*steps, strict=True):
        samples = [i for step in together for batch in step.micro_batches for i in batch]
        assert len(set(samples)) == len(samples) == together[0].num_samples
        for step, one, size in zip(together, found, dealt.batch_sizes, strict=True):
            largest = max(3, one.max_size) if size == 2 else one.max_size  # three rather than a pair and a lone one
            assert all(len(batch) <= largest for batch in step.micro_batches)
    assert sorted(i for own in steps for step in own for batch in step.micro_batches for i in batch) == list(
        range(plan.num_samples)
    )


@given(
    kinds=st.dictionaries(st.sampled_from("abcdef"), st.floats(100, 800), min_size=2),
    sizes=st.lists(st.integers(8, 64).map(lambda n: 8 * n), min_size=6, max_size=6),
)
def test_nobody_waits_but_for_rounding_where_memory_does_not_matter(kinds, sizes):
    found = [rank(speed, size, device=kind) for (kind, speed), size in zip(sorted(kinds.items()), sizes, strict=False)]
    dealt = deal(found, global_size=None, accumulate=1)
    seconds = max(one.batch_size / one.images_per_s for one in found)
    for size, one in zip(dealt.batch_sizes, found, strict=True):
        assert seconds * one.images_per_s - 8 < size <= seconds * one.images_per_s + 0.5
        assert size >= one.batch_size - 8


def test_equal_devices_that_a_short_run_measured_roughly_share_evenly():
    ranks = [
        RankBatch(device="cpu", batch_size=24, max_size=24, images_per_s=speed, cut_for_s=9.0) for speed in (54.0, 75.0)
    ]
    assert deal(ranks, global_size=None, accumulate=1).shares == (24, 24)
