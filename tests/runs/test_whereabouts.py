"""A run is carried out once at a time, and not at all where there is nothing left of it to do."""

from __future__ import annotations

import os

import pytest

from launcher import start
from launcher.backends import living
from launcher.backends.slurm import client as slurm_client
from launcher.errors import UsageError
from launcher.recipe import load as recipes
from launcher.runs import states, whereabouts
from launcher.runs.whereabouts import JobState
from launcher.system import processes


@pytest.fixture
def slurm(monkeypatch):
    """The states of jobs."""
    jobs = {}
    monkeypatch.setattr(slurm_client, "job_states", lambda ids: {i: JobState(job_id=i, state=jobs[i]) for i in ids})
    return jobs


@pytest.mark.parametrize(
    ("state", "found"),
    [("RUNNING", "job 8"), ("PENDING", "job 8"), ("COMPLETED", None), ("PREEMPTED", None), ("UNKNOWN", None)],
)
def test_a_run_lives_as_long_as_its_last_job(state, found, make_run, slurm):
    run = make_run("a", job_id="7", state="preempted")
    run.append_event("launched")
    run.append_event("submitted", job_id="8")
    slurm.update({"8": state})
    assert living.living(run) == found
    if found:
        with pytest.raises(UsageError, match=r"runs as job 8; .*launch cancel .*runs/a first") as error:
            living.refuse_second(run)
        assert error.value.exit_code == 2


def test_a_run_lives_as_long_as_the_process_that_launched_it_here(make_run):
    mine = {"pid": os.getpid(), "started": processes.start_time(os.getpid())}
    found = f"process {os.getpid()}"
    assert living.living(make_run("a", state="running", **mine)) == found
    assert living.living(make_run("d", state="failed", **mine)) is None  # of a sweep that goes on with others
    assert living.living(make_run("e", state="running", host="elsewhere", **mine)) is None
    assert living.living(make_run("f", state="running", pid=os.getpid(), started="1")) is None


def test_without_an_answer_of_slurm_it_is_not_known_and_said(make_run, monkeypatch, capsys):
    def no_answer(_ids):
        raise slurm_client.SlurmError("squeue: no answer")

    monkeypatch.setattr(slurm_client, "job_states", no_answer)
    assert living.living(make_run("a", job_id="7", state="running")) is None
    assert "whether job 7 still runs is unknown: squeue: no answer" in capsys.readouterr().err


def test_a_job_whose_turn_comes_refuses_to_be_the_second(make_run, slurm):
    run = make_run("a", job_id="7", state="running")
    run.append_event("launched")
    run.append_event("submitted", job_id="8")
    slurm.update({"7": "RUNNING", "8": "RUNNING"})
    with pytest.raises(UsageError, match="runs as job 7 already"):
        living.refuse_second_job(run, "8")
    living.refuse_second_job(run, "7")  # which may have been queued again meanwhile
    living.refuse_second_job(run, "9")  # an allocation's
    slurm["7"] = "CANCELLED"
    living.refuse_second_job(run, "8")


def recipe(**train):
    return recipes.from_dict({"data": {"name": "digits"}, "train": {"epochs": 3, **train}})


@pytest.mark.parametrize(
    ("state", "train", "left"),
    [
        ("completed", {}, False),
        ("completed", {"epochs": 2}, False),
        ("completed", {"epochs": 4}, True),
        ("early_stopped", {}, False),
        ("early_stopped", {"epochs": 9}, False),
        ("early_stopped", {"early_stopping": {"patience": 9}}, True),
        ("preempted", {}, True),
        ("failed", {}, True),
    ],
)
def test_a_trained_run_has_something_left_only_where_the_recipe_asks_for_more(state, train, left, make_run, capsys):
    run = make_run("a", state=state, recipe=recipes.to_yaml(recipe()))
    assert start.has_nothing_left(run, recipe(**train)) != left
    said = capsys.readouterr().out
    assert (f"{state} already" in said and "launch export" in said and "launch report" in said) != left


def test_a_trained_run_has_a_test_set_left_that_it_did_not_measure(make_run):
    run = make_run("a", state="completed", recipe=recipes.to_yaml(recipe()))
    asked = recipes.from_dict({"data": {"name": "digits", "test": "holdout"}, "train": {"epochs": 3}})
    best = {"step": 5, "epoch": 1, "weights": None}
    assert start.has_nothing_left(run, asked)  # there is no best checkpoint to measure
    run.update_status(best=best)
    assert not start.has_nothing_left(run, asked)
    run.update_status(test=states.of_test("test", best) | {"samples": 9})
    assert not start.has_nothing_left(run, asked)
    run.update_status(test=states.of_test("holdout", best) | {"samples": 9})
    assert start.has_nothing_left(run, asked)
    run.update_status(best=best | {"step": 6})
    assert not start.has_nothing_left(run, asked)


def test_when_a_job_is_expected_to_start_is_no_part_of_its_state():
    """SLURM thinks anew all the time; who follows the job acts upon changes, among others by having it start early."""
    assert JobState(state="PENDING", expected="2026-01-31T12:00:00") == JobState(
        state="PENDING", expected="2026-01-31T12:00:10"
    )


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ({"state": "pending"}, None),
        ({"state": "running", "epoch": 0}, 1),
        ({"state": "failed", "epoch": 2, "epochs": 5}, 3),
        ({"state": "running", "epoch": 5, "epochs": 5}, 5),  # the last validation is over, the exports are not
        ({"state": "completed", "epoch": 5, "epochs": 5}, 5),
        ({"state": "early_stopped", "epoch": 3, "epochs": 5}, 3),
    ],
)
def test_people_count_epochs_from_one(status, shown):
    assert whereabouts.epoch_shown(status) == shown
