"""Which rank holds the others up, and by what."""

from __future__ import annotations

import json
import time

import pytest

from launcher.engine.listeners.rank_times import find_slowest


@pytest.mark.parametrize(
    ("compute_s", "wait_s", "rank", "cause", "is_slow"),
    [
        ([0.1, 0.1, 0.15, 0.1], [0, 0, 0, 0], 2, "device", True),
        ([0.1, 0.1, 0.11, 0.1], [0, 0, 0, 0], 2, "device", False),  # devices differ by so much
        ([0.1, 0.1], [0, 0.05], 1, "loader", True),
        ([0.1, 0.1, 0.12], [0.0, 0.2, 0.01], 1, "loader", True),
        ([0.001, 0.001, 0.002], [0, 0, 0], 2, "device", False),  # a millisecond is noise
        ([0.5], [3.0], 0, "device", False),  # nobody waits for it
        ([0.1, 0.1], [0.1, 0.1], 0, "device", False),  # all wait alike
    ],
)
def test_the_slowest_is_named_only_where_it_is_clearly_slower(compute_s, wait_s, rank, cause, is_slow):
    found = find_slowest(compute_s, wait_s)
    assert (found.rank, found.cause, found.is_slow) == (rank, cause, is_slow)


SLOW_S = 0.6
"""A step; several times what another process may take from a rank on a busy machine."""


@pytest.mark.parametrize("cause", ["device", "loader"])
def test_of_two_ranks_the_slowed_one_is_named_with_its_cause(make_run, engine, in_ranks, cause):
    run = make_run(train={"epochs": 5}, tracking={"log_every": 1})

    def prepare(parts):
        if parts.ranks.rank != 1:
            return
        if cause == "device":
            parts.model.module.register_forward_pre_hook(lambda *_: time.sleep(SLOW_S) if parts.ddp.training else None)
        else:
            load = parts.train_set.load
            parts.train_set.load = lambda index: (time.sleep(SLOW_S / 8), load(index))[1]

    in_ranks(2, lambda ranks: engine.train(run, ranks, prepare=prepare).step)
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    (event,) = [event for event in events if event["kind"] == "straggler" and event["cause"] == cause]
    assert event["straggler"] == 1
    assert event["behind"] > 0.2
    assert f"by its {cause}" in event["message"]
