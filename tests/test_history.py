from __future__ import annotations

import pytest

from launcher.history import events, next_attempt
from launcher.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    found = RunDir(tmp_path)
    found.create()
    return found


def test_the_first_attempt_is_1(run):
    assert next_attempt(run) == 1


def test_the_next_attempt_follows_the_last_that_was_started_on_any_node(run):
    for attempt, node in ((1, 0), (1, 1), (2, 1), (2, 0)):
        run.append_event("attempt_started", attempt=attempt, node=node)
    run.append_event("attempt_ended", attempt=9)  # only starts count
    assert next_attempt(run) == 3


def test_an_attempt_whose_event_was_cut_off_by_a_crash_does_not_stop_the_count(run):
    run.append_event("attempt_started", attempt=1)
    with run.events.open("a") as file:
        file.write('{"time": 1, "kind": "attempt_sta')
    assert next_attempt(run) == 2


def test_events_of_a_kind_come_in_the_order_they_happened(run):
    for step in (10, 5, 20):
        run.append_event("checkpoint", step=step)
        run.append_event("signal", signal="SIGTERM")
    assert [event["step"] for event in events(run, "checkpoint")] == [10, 5, 20]
    assert [event["signal"] for event in events(run, "signal")] == ["SIGTERM"] * 3
    assert events(run, "export") == []
