"""The engine in a run that shrinks and grows: the samples of a step, batch sizes, and workers that are left behind."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.checkpoints.checkpoint import Checkpoint
from launcher.engine.distributed import Ranks
from launcher.engine.listeners.recorder import Recorder
from launcher.engine.schedule import Batching, Schedule
from launcher.engine.setup import build_parts, fixed_batching
from launcher.engine.state import limits_here
from launcher.engine.tuning import autotune
from launcher.errors import EXIT_RESUMABLE
from launcher.recipe.load import read_resolved
from launcher.recipe.schema import BatchConfig
from launcher.runs.generations import NEXT_VARIABLE
from launcher.system.files import write_json_atomic

GB = 1 << 30


def steps(batching, *, num_samples):
    """Of each step, the samples of each rank's micro-batches."""
    schedule = Schedule(seed=3, num_samples=num_samples, batching=batching)
    ranks = range(len(batching.batch_sizes))
    of_ranks = [schedule.steps(rank, epoch=0, offset=0, end_epoch=2) for rank in ranks]
    return [[step.micro_batches for step in of_step] for of_step in zip(*of_ranks, strict=True)]


@given(
    size=st.integers(1, 6),
    accumulate=st.integers(1, 3),
    full=st.integers(1, 6),
    num_samples=st.integers(1, 90),
    data=st.data(),
)
def test_with_fewer_ranks_each_step_has_the_same_samples_and_no_rank_takes_more_at_once(
    size, accumulate, full, num_samples, data
):
    config, now = BatchConfig(size=size, accumulate=accumulate), data.draw(st.integers(1, full))
    found = []
    for num in (full, now):
        batching = fixed_batching(config, Ranks(world_size=num), full_size=full, debug=False)
        dealt = steps(batching, num_samples=num_samples)
        largest = max(len(batch) for of_step in dealt for of_rank in of_step for batch in of_rank)
        assert largest <= (3 if size == 2 else size)  # a single one goes with a pair
        found.append([sorted(i for of_rank in of_step for batch in of_rank for i in batch) for of_step in dealt])
    assert found[0] == found[1]


def measured(rank, *, size=32, speed=100.0, device="A", found_in="run"):
    known = {"rank": rank, "host": f"n{rank}", "device": device, "total_bytes": GB, "from": found_in}
    return known | {"batch_size": size, "max_size": 2 * size, "images_per_s": speed}


@given(num=st.integers(1, 5), full=st.integers(1, 5), kept=st.none() | st.integers(8, 400), data=st.data())
def test_measured_sizes_are_dealt_within_the_global_batch_that_the_run_began_with(num, full, kept, data):
    speeds = [data.draw(st.floats(10.0, 500.0)) for _ in range(num)]
    found = [measured(rank, speed=speed) for rank, speed in enumerate(speeds)]
    before = Batching(batch_sizes=(8,), shares=(8,), global_batch_size=kept) if kept else None
    alone = autotune._deal(found, BatchConfig(size="auto"), None, 0)
    dealt = autotune._deal(found, BatchConfig(size="auto"), before, full)
    assert dealt.global_batch_size == (kept or alone.global_batch_size * full // num)
    assert len(dealt.batch_sizes) == num


@pytest.mark.slow
def test_the_batch_that_a_run_began_with_stays_and_is_what_all_its_ranks_would_take(make_run, in_ranks):
    run = make_run(batch={"size": "auto"})
    write_json_atomic(run.plan, {"run_id": "run", "nodes": 3, "min_nodes": 1, "procs_per_node": 1})
    recipe = read_resolved(run.recipe)

    def agreed(*found):
        return in_ranks(len(found), lambda who: autotune.agree(run, recipe, who, found[who.rank], print))

    (first, _) = agreed(*(measured(rank, found_in="probes") for rank in (0, 1)))  # the third has not come
    assert (first.batch_sizes, first.global_batch_size) == ((32, 32), 96)
    kept = run.tuning.read_text()
    (alone,) = agreed(measured(0, found_in="alike"))
    assert (alone.batch_sizes, alone.global_batch_size) == ((32,), 96)
    whole = agreed(*(measured(rank, found_in="alike") for rank in (0, 1, 2)))
    assert {one.global_batch_size for one in whole} == {96}
    assert run.tuning.read_text() == kept
    who = {"rank": 2, "host": "n2", "device": "A", "total_bytes": GB}
    assert autotune._kept(run, who, Ranks(rank=2, world_size=3))["from"] == "alike"
    assert autotune._kept(run, who | {"device": "B"}, Ranks(rank=2, world_size=3)) is None
    write_json_atomic(run.plan, {"run_id": "run", "nodes": 3, "procs_per_node": 1})
    assert autotune._kept(run, who, Ranks(rank=2, world_size=3)) is None  # as ever, where it does not shrink


def test_the_size_of_a_plan_reaches_the_schedule(make_run, engine):
    run = make_run(batch={"size": 4})
    write_json_atomic(run.plan, {"run_id": "run", "nodes": 3, "min_nodes": 2, "procs_per_node": 2})
    parts = build_parts(run, Ranks(world_size=4), engine.cpu)
    assert parts.schedule.batching == Batching(batch_sizes=(4,) * 4, shares=(4,) * 4, global_batch_size=24)


@pytest.mark.parametrize(
    ("then", "now", "limits"),
    [
        ([7, 7], [7, 7], [4, 8]),
        ([7, 7], [7], [4]),
        ([7, 9], [9, 9, 7], [8, 8, 4]),
        ([7, 7], [9], None),  # of such a device nothing is known
    ],
)
def test_what_ranks_could_take_at_once_holds_for_devices_with_as_much_memory(then, now, limits):
    assert limits_here([4, 8], then, now) == limits
    assert limits_here(None, then, now) is None


def write_checkpoint(run):
    weights = {"weight": torch.zeros(2)}
    checkpoints.write(run, Checkpoint(step=3, model=weights, optimizer={}, state={"step": 3}))


def write_metrics(run):
    recorder = Recorder.__new__(Recorder)
    recorder._run, recorder._unwritten = run, []
    recorder._writing = multiprocessing.Lock()
    recorder._write(lambda: run.append_metrics(step=3))


@pytest.mark.parametrize("write", [write_checkpoint, write_metrics])
@pytest.mark.parametrize("is_over", [False, True])
def test_a_worker_writes_nothing_once_the_others_have_gone_on(write, is_over, make_run, tmp_path, monkeypatch):
    following, run = tmp_path / "generation-0002.json", make_run()
    monkeypatch.setenv(NEXT_VARIABLE, str(following))
    if is_over:
        following.write_text("{}")
    process = multiprocessing.get_context("fork").Process(target=write, args=(run,))
    process.start()
    process.join()
    assert process.exitcode == (EXIT_RESUMABLE if is_over else os.EX_OK)
    assert (run.checkpoint(3).exists() or run.metrics.exists()) == (not is_over)
