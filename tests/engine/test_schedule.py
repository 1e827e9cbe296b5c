from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.engine.schedule import (
    Batching,
    Schedule,
    derive_seed,
    epoch_order,
    split_by_shares,
    step_sizes,
    validation_batches,
)

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)
SEEDS = st.integers(0, 2**32)


@st.composite
def batchings(draw):
    """Of any ranks, whose shares are those of their batch sizes or others."""
    sizes = draw(SIZES)
    shares = draw(st.one_of(st.just(sizes), st.tuples(*(st.integers(1, 1000) for _ in sizes))))
    return Batching(batch_sizes=sizes, shares=shares, global_batch_size=draw(st.integers(1, 40)))


@st.composite
def schedules(draw, num_samples=None, seed=None, excluded=frozenset()):
    """Of any ranks; of the samples that are left out, ``excluded`` are among them."""
    num_samples = draw(st.integers(1, 60)) if num_samples is None else num_samples
    return Schedule(
        seed=draw(SEEDS) if seed is None else seed,
        num_samples=num_samples,
        batching=draw(batchings()),
        excluded=excluded | draw(st.frozensets(st.integers(0, num_samples - 1), max_size=5)),
    )


def steps_of_ranks(plan, *, epoch=0, offset=0, end_epoch=1):
    """Step by step, what each rank does."""
    ranks = range(len(plan.batching.batch_sizes))
    return list(
        zip(*(plan.steps(r, epoch=epoch, offset=offset, end_epoch=end_epoch) for r in ranks), strict=True),
    )


def visited(steps):
    return [(step.epoch, i) for ranks in steps for step in ranks for batch in step.micro_batches for i in batch]


@given(plan=schedules(), epochs=st.integers(1, 3))
def test_an_epoch_visits_every_index_exactly_once(plan, epochs):
    seen = visited(steps_of_ranks(plan, end_epoch=epochs))
    used = [i for i in range(plan.num_samples) if i not in plan.excluded]
    assert sorted(seen) == [(epoch, i) for epoch in range(epochs) for i in used]


@given(data=st.data(), plan=schedules())
def test_also_after_two_resumes_with_other_ranks_batches_and_images_left_out(data, plan):
    epochs, epoch, offset, seen = 2, 0, 0, []
    for last in (False, False, True):
        steps = steps_of_ranks(plan, epoch=epoch, offset=offset, end_epoch=epochs)
        done = steps if last else steps[: data.draw(st.integers(0, len(steps)))]
        seen += visited(done)
        if done:
            epoch, offset = done[-1][0].epoch, done[-1][0].end
        if not last:
            plan = data.draw(schedules(plan.num_samples, plan.seed, plan.excluded))
    assert len(set(seen)) == len(seen)
    missed = {(e, i) for e in range(epochs) for i in range(plan.num_samples)} - set(seen)
    assert {i for _, i in missed} <= plan.excluded  # nothing else, whatever happened on the way


@given(plan=schedules(), data=st.data())
def test_one_more_that_is_left_out_moves_no_other_sample_to_another_place(plan, data):
    index = data.draw(st.integers(0, plan.num_samples - 1))
    single = replace(plan, batching=replace(plan.batching, global_batch_size=1))
    more = replace(single, excluded=plan.excluded | {index})
    before = [(s[0].offset, visited([s])) for s in steps_of_ranks(single)]
    after = [(s[0].offset, visited([s])) for s in steps_of_ranks(more)]
    assert after == [(offset, samples) for offset, samples in before if samples != [(0, index)]]


def lone(steps):
    """The micro-batches of a single sample."""
    return [batch for ranks in steps for step in ranks for batch in step.micro_batches if len(batch) == 1]


@given(plan=schedules(), data=st.data())
def test_no_sample_is_alone_where_there_is_another_way(plan, data):
    """At any world size and shares, of whatever accumulation, whatever is left out, and across a resume."""
    size = data.draw(st.integers(2, 40))
    dealt = replace(
        plan.batching, batch_sizes=tuple(max(2, b) for b in plan.batching.batch_sizes), global_batch_size=size
    )
    plan, used = replace(plan, batching=dealt), plan.num_samples - len(plan.excluded)
    steps = steps_of_ranks(plan)
    assert len(lone(steps)) == (used == 1)
    stopped = data.draw(st.integers(0, len(steps)))
    offset = steps[stopped - 1][0].end if stopped else 0
    others = tuple(max(2, b) for b in data.draw(batchings()).batch_sizes)
    resumed = replace(plan, batching=Batching(batch_sizes=others, shares=others, global_batch_size=size))
    rest = steps_of_ranks(resumed, offset=offset) if stopped < len(steps) else []
    assert len(lone(rest)) == (used == 1 and stopped == 0)
    assert [sorted(visited([ranks])) for ranks in rest] == [sorted(visited([ranks])) for ranks in steps[stopped:]]


@pytest.mark.parametrize(
    ("num", "sizes", "shares", "global_size", "expected"),
    [
        (41, (8,), (8,), 8, [[8], [8], [8], [8], [5], [4]]),
        (40, (8,), (8,), 8, [[8], [8], [8], [8], [8]]),
        (44, (8,), (8,), 8, [[8], [8], [8], [8], [8], [4]]),
        (9, (2,), (2,), 2, [[2], [2], [2], [3]]),
        (9, (2,), (2,), 8, [[3, 2], [2, 2]]),  # accumulated: rather three at once than one alone
        (5, (8, 8), (3, 1), 16, [[5, 0]]),
        (3, (8, 8), (8, 8), 16, [[3, 0]]),
        (3, (4, 4, 4, 4), (4, 4, 4, 4), 16, [[3, 0, 0, 0]]),  # fewer than ranks
        (17, (2,) * 8, (2,) * 8, 16, [[3, 0, 2, 0, 2, 0, 2, 0], [2, 0, 2, 0, 2, 0, 2, 0]]),
        (9, (1,), (1,), 8, [[1] * 5, [1] * 4]),  # what the recipe asks for
        (1, (8,), (8,), 8, [[1]]),
    ],
)
def test_the_last_steps_are_dealt_evenly(num, sizes, shares, global_size, expected):
    plan = Schedule(
        seed=0,
        num_samples=num,
        batching=Batching(batch_sizes=sizes, shares=shares, global_batch_size=global_size),
    )
    found = [[len(batch) for step in ranks for batch in step.micro_batches] for ranks in steps_of_ranks(plan)]
    assert found == expected
    assert plan.steps_per_epoch == len(expected)


@given(num=st.integers(0, 500), size=st.integers(1, 60))
def test_steps_are_global_batches_and_none_of_an_epoch_is_less_than_half_of_one(num, size):
    sizes = step_sizes(num, size)
    assert sum(sizes) == num
    assert all(step == size for step in sizes[:-2])
    assert all(0 < step <= max(size, 3 if size == 2 else 0) for step in sizes)
    if num > size:
        assert min(sizes) >= size / 2
    for done in range(len(sizes)):  # a position is all that there is to go on from
        assert step_sizes(num - sum(sizes[:done]), size) == sizes[done:]


@given(plan=schedules())
def test_a_lone_sample_on_any_rank_is_known_to_all(plan):
    for ranks in steps_of_ranks(plan):
        expected = any(len(batch) == 1 for step in ranks for batch in step.micro_batches)
        assert {step.lone for step in ranks} == {expected}


@given(plan=schedules(), data=st.data())
def test_resumed_at_any_offset_the_rest_of_the_order_follows_and_nothing_of_it_twice(plan, data):
    offset = data.draw(st.integers(0, plan.num_samples))
    seen = [i for _, i in visited(steps_of_ranks(plan, epoch=3, offset=offset, end_epoch=4))]
    rest = epoch_order(plan.seed, 3, plan.num_samples)[offset:].tolist()
    assert seen == [i for i in rest if i not in plan.excluded]


@given(plan=schedules())
def test_the_ranks_part_each_step_among_them_in_the_orders_order(plan):
    order = [i for i in epoch_order(plan.seed, 0, plan.num_samples).tolist() if i not in plan.excluded]
    steps = steps_of_ranks(plan)
    assert len(steps) == plan.steps_per_epoch
    start = 0
    for ranks, size in zip(steps, step_sizes(len(order), plan.batching.global_batch_size), strict=True):
        expected = order[start : start + size]
        start += size
        assert [i for step in ranks for batch in step.micro_batches for i in batch] == expected
        assert {(step.epoch, step.num_samples) for step in ranks} == {(0, len(expected))}
        assert {step.offset for step in ranks} == {
            epoch_order(plan.seed, 0, plan.num_samples).tolist().index(expected[0])
        }
    ends = [ranks[0].end for ranks in steps]
    assert ends == [ranks[0].offset for ranks in steps[1:]] + [plan.num_samples] * bool(steps)


def in_pairs(num, dealt):
    """Whether some rank that can take more would have a single sample, dealt in proportion."""
    slices = split_by_shares(num, dealt.shares)
    return any(end - start == 1 < size for (start, end), size in zip(slices, dealt.batch_sizes, strict=True))


@given(plan=schedules())
def test_a_rank_takes_its_share_in_batches_of_at_most_its_size_rank_0_always(plan):
    dealt = plan.batching
    for ranks in steps_of_ranks(plan):
        assert ranks[0].micro_batches[0]
        for step, size, share in zip(ranks, dealt.batch_sizes, dealt.shares, strict=True):
            lengths = [len(batch) for batch in step.micro_batches]
            assert lengths
            odd = size == 2 and sum(lengths) % 2 and sum(lengths) > 1  # three go at once rather than one alone
            assert max(lengths) <= size + odd
            assert max(lengths) - min(lengths) <= 1
            off = abs(sum(lengths) - step.num_samples * share / sum(dealt.shares))
            assert off < (3 if in_pairs(step.num_samples, dealt) else 1)
            assert len(lengths) == max(1, -(-sum(lengths) // size) - odd)


@given(num=st.integers(0, 10**9), shares=SIZES)
def test_shares_cut_a_range_without_a_gap_and_the_first_is_never_empty(num, shares):
    slices = split_by_shares(num, shares)
    assert len(slices) == len(shares)
    assert (slices[0][0], slices[-1][1]) == (0, num)
    assert all(a[1] == b[0] and b[0] <= b[1] for a, b in pairwise(slices))
    assert slices[0][1] >= min(num, 1)


@pytest.mark.parametrize(
    ("seed", "epoch", "first"),
    [
        (0, 0, [998, 162, 670, 664, 185, 322, 431, 318]),
        (0, 1, [338, 261, 724, 958, 333, 497, 17, 614]),
        (7, 3, [702, 703, 148, 932, 542, 65, 995, 581]),
    ],
)
def test_the_order_is_the_same_for_ever(seed, epoch, first):
    assert epoch_order(seed, epoch, 1000)[:8].tolist() == first


def test_seeds_are_the_same_for_ever():
    assert derive_seed(0, 1, 2) == 1535930435702422785
    assert derive_seed(2**40, 1) == 4089456125571929829


@given(seed=SEEDS, epoch=st.integers(0, 1000), num=st.integers(30, 200))
def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone(seed, epoch, num):
    order = epoch_order(seed, epoch, num).tolist()
    np.random.seed(epoch)  # noqa: NPY002  the order must not heed it
    assert epoch_order(seed, epoch, num).tolist() == order
    assert sorted(order) == list(range(num))
    assert order != epoch_order(seed, epoch + 1, num).tolist()
    assert order != epoch_order(seed + 1, epoch, num).tolist()
    assert order != list(range(num))


def test_every_index_comes_early_and_late():
    position = np.mean([np.argsort(epoch_order(0, epoch, 20)) for epoch in range(400)], axis=0)
    assert np.all(np.abs(position - 9.5) < 1.5)  # five times the deviation of such a mean


@given(numbers=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50)), min_size=2, unique=True))
def test_seeds_of_different_numbers_differ_and_fit_torch(numbers):
    seeds = [derive_seed(*three) for three in numbers]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(num=st.integers(0, 200), batching=batchings())
def test_validation_takes_every_sample_once_and_every_rank_has_as_many_batches(num, batching):
    sizes, shares = batching.batch_sizes, batching.shares
    ranks = [validation_batches(num, rank=r, batching=batching) for r in range(len(sizes))]
    assert [i for batches in ranks for batch in batches for i in batch] == list(range(num))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) <= size for batches, size in zip(ranks, sizes, strict=True) for batch in batches)
    assert all(
        abs(sum(map(len, batches)) - num * share / sum(shares)) < 1
        for batches, share in zip(ranks, shares, strict=True)
    )


@given(plan=schedules(), most=st.integers(0, 20), epoch=st.integers(0, 3))
def test_statistics_come_from_the_same_batches_of_one_size_at_any_world_size(plan, most, epoch):
    sizes, used = plan.batching.batch_sizes, plan.num_samples - len(plan.excluded)
    ranks = [plan.statistics_batches(r, epoch=epoch, most=most) for r in range(len(sizes))]
    assert len({len(batches) for batches in ranks}) == 1
    found = [batch for turn in zip(*ranks, strict=True) for batch in turn if batch]
    single = replace(plan.batching, batch_sizes=(min((b for b in sizes if b > 1), default=1),), shares=(1,))
    assert [b for b in replace(plan, batching=single).statistics_batches(0, epoch=epoch, most=most) if b] == found
    assert not {i for batch in found for i in batch} & plan.excluded
    assert len({i for batch in found for i in batch}) == sum(map(len, found))
    if found:
        assert ranks[0][0]
        assert {len(batch) for batch in found} == {min(single.batch_sizes[0], used)}
    else:
        assert most == 0 or single.batch_sizes[0] == 1 or used < 2
