from __future__ import annotations

import pytest

from launcher.runs.history import BUDGETS, close_attempt, events, next_attempt, num_memory_kills, refusal
from launcher.runs.run_dir import BATCH_LOG_VARIABLE, RunDir


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


def test_kills_of_a_nodes_workers_for_want_of_memory_count_since_the_last_checkpoint(run):
    for attempt, node in ((1, 0), (2, 0), (2, 1)):
        run.append_event("memory_kill", attempt=attempt, node=node)
    assert [num_memory_kills(run, node) for node in range(3)] == [2, 1, 0]
    run.append_event("checkpoint", attempt=3, step=10)
    assert num_memory_kills(run, 0) == 0
    run.append_event("memory_kill", attempt=3, node=0)
    assert num_memory_kills(run, 0) == 1


def test_events_of_a_kind_come_in_the_order_they_happened(run):
    for step in (10, 5, 20):
        run.append_event("checkpoint", step=step)
        run.append_event("signal", signal="SIGTERM")
    assert [event["step"] for event in events(run, "checkpoint")] == [10, 5, 20]
    assert [event["signal"] for event in events(run, "signal")] == ["SIGTERM"] * 3
    assert events(run, "export") == []


def attempt(run, number, cause, *, steps=(), hosts=("n1", "n2")):
    """The events of an attempt; None: it left no word of its end."""
    for node, host in enumerate(hosts):
        run.append_event("attempt_started", attempt=number, node=node, host=host)
    for step in steps:
        run.append_event("checkpoint", attempt=number, step=step, seconds=0.1)
    if cause:
        run.append_event("attempt_ended", attempt=number, node=0, cause=cause, message="")


def test_while_steps_advance_there_is_no_limit(run):
    for number in range(1, 101):
        attempt(run, number, "preempted" if number % 2 else "time_limit", steps=[number * 10])
        assert refusal(run) is None


@pytest.mark.parametrize(("cause", "budget"), BUDGETS.items())
def test_without_a_new_step_each_cause_has_its_budget(run, cause, budget):
    attempt(run, 1, "preempted", steps=[5])
    for number in range(2, 2 + budget):
        assert refusal(run) is None
        attempt(run, number, cause, steps=[5] if number % 2 else [])  # the same step once more is no progress
    found = refusal(run)
    assert found.startswith(
        f"{budget} attempts in a row ended at step 5" if budget > 1 else "an attempt ended at step 5"
    )
    attempt(run, 50, cause, steps=[6])
    assert refusal(run) is None


def test_an_attempt_without_a_word_is_closed_with_what_is_known(run):
    close_attempt(run)
    assert events(run, "attempt_ended") == []  # there was none
    attempt(run, 1, None)
    close_attempt(run)
    close_attempt(run)
    (end,) = events(run, "attempt_ended")
    assert (end["attempt"], end["cause"]) == (1, "lost_node")
    assert "one of n1, n2" in end["message"]
    run.append_event("supervisor_lost", host="n7")  # of the attempt that was closed
    attempt(run, 2, None)
    close_attempt(run, lost_nodes=["n2", "n9"])
    assert events(run, "attempt_ended")[-1]["message"] == "SLURM lost n2 (node failure)"
    attempt(run, 3, None)
    run.append_event("supervisor_lost", host="n1")
    close_attempt(run, lost_nodes=["n2"])
    assert events(run, "attempt_ended")[-1]["message"] == "the supervisor on n1 was killed"


@pytest.mark.parametrize("outcome", ["completed", "early_stopped"])
def test_an_attempt_that_trained_to_its_end_lost_no_node(run, outcome):
    """Its job may be cut in the exports, or the run be trained further."""
    attempt(run, 1, None)
    run.append_event("training_ended", attempt=1, outcome=outcome)
    run.append_event("signal", signal="SIGUSR2", node=0)
    close_attempt(run)
    assert events(run, "attempt_ended") == []


@pytest.mark.parametrize(
    ("name", "is_batch", "cause"),
    [("SIGUSR2", True, "time_limit"), ("SIGTERM", True, "preempted"), ("SIGUSR2", False, "interrupted")],
)
def test_an_attempt_that_was_told_to_stop_and_killed_before_it_had_lost_no_node(
    run, name, is_batch, cause, monkeypatch
):
    if is_batch:
        monkeypatch.setenv(BATCH_LOG_VARIABLE, "log")
    attempt(run, 1, None)
    run.append_event("signal", signal=name, node=0)
    run.append_event("training_ended", attempt=1, outcome="preempted")
    close_attempt(run)
    (end,) = events(run, "attempt_ended")
    assert (end["cause"], end["message"]) == (cause, f"stopped by {name}, and killed before the end of it")


def test_signals_that_only_the_other_nodes_got_do_not_hide_a_lost_one(run):
    run.append_event("signal", signal="SIGTERM", node=0)  # of an earlier attempt
    attempt(run, 1, None)
    run.append_event("signal", signal="SIGTERM", node=1)
    close_attempt(run)
    attempt(run, 2, None)
    run.append_event("signal", signal="SIGTERM", node=0)  # srun ends the rest
    run.append_event("supervisor_lost", host="n2")
    close_attempt(run)
    assert [event["cause"] for event in events(run, "attempt_ended")] == ["lost_node"] * 2


def test_an_attempt_before_the_launch_that_is_closed_after_it_counts_for_none(run):
    attempt(run, 1, None)
    run.append_event("signal", signal="SIGINT", node=0)
    run.append_event("launched", backend="slurm")
    close_attempt(run)
    assert [event["cause"] for event in events(run, "attempt_ended")] == ["interrupted"]
    assert refusal(run) is None


def test_who_launches_a_run_again_begins_anew(run):
    run.append_event("launched", backend="slurm")
    attempt(run, 1, "preempted", steps=[5])
    attempt(run, 2, "bug")
    assert refusal(run).startswith("an attempt ended at step 5 (bug)")
    run.append_event("launched", backend="slurm")
    assert refusal(run) is None
    attempt(run, 3, "bug", steps=[5])  # the same step is still no progress
    assert refusal(run) is not None
