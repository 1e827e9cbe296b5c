"""`launch ps` without SLURM; tests/slurm has it on a cluster."""

from __future__ import annotations

import dataclasses
import json

import pytest

from launcher.backends.slurm import client as slurm_client
from launcher.commands import ps as jobs
from launcher.commands.watched import Watched
from launcher.errors import UsageError
from launcher.runs import diagnose
from launcher.runs.whereabouts import JobState

BEST = {"metric": "val/top1", "value": 0.98765, "epoch": 1, "step": 10}


def test_ps_shows_every_run_below_a_folder_with_its_job(make_run, tmp_path, monkeypatch, capsys):
    asked = []

    def job_states(ids):
        asked.extend(ids)
        return {job_id: JobState(state="RUNNING") for job_id in ids}

    monkeypatch.setattr(slurm_client, "job_states", job_states)
    made = make_run("a", job_id="7", state="completed", attempt=1, epoch=3, step=9, best=BEST)
    make_run("group/b", job_id="8", state="running", attempt=2, epoch=0, epochs=3, step=4, best=None)
    make_run("c", state="running")
    (tmp_path / "runs" / "no-run").mkdir()
    jobs.ps(str(tmp_path / "runs"), as_json=False)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["RUN", "STATE", "JOB", "ATTEMPT", "EPOCH", "STEP", "BEST", "UPDATED"]
    found = {line.split()[0].rsplit("/", 1)[1]: line.split()[1:] for line in lines}
    assert found["a"][:6] == ["completed", "7", "1", "3", "9", "val/top1"]
    assert found["a"][6] == "0.9877"
    assert found["b"][:6] == ["running", "8", "RUNNING", "2", "1/3", "4"]
    made.append_event("post_submitted", job_id="9")
    jobs.ps(str(made.path), as_json=False)
    assert capsys.readouterr().out.splitlines()[1].split()[1:5] == ["completed", "9", "RUNNING", "exports"]
    asked.remove("9")
    assert found["c"][:5] == ["running", "-", "-", "-", "-"]
    assert asked == ["8"]  # what is over is not asked for


def test_ps_says_where_a_run_goes_on_with_fewer_nodes(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slurm_client, "job_states", lambda ids: {job_id: JobState(state="RUNNING") for job_id in ids})
    for name, nodes, state in (("a", 2, "running"), ("b", 3, "running"), ("c", 2, "completed")):
        run = make_run(name, job_id="7", state=state, nodes=nodes)
        run.write_plan(dataclasses.replace(run.read_plan(), nodes=3, min_nodes=2), run.read_launched())
    jobs.ps(str(tmp_path / "runs"), as_json=False)
    lines = sorted(line.split("  ")[1].strip() for line in capsys.readouterr().out.splitlines()[1:])
    assert lines == ["completed", "running", "running on 2 of 3 nodes"]


@pytest.mark.parametrize(("cause", "word"), [("interrupted", "interrupted"), ("preempted", "preempted")])
def test_a_run_that_somebody_stopped_is_interrupted_and_not_preempted(cause, word, make_run, tmp_path, capsys):
    run = make_run("a", state="preempted", attempt=1)
    run.append_event("attempt_ended", attempt=1, node=0, cause=cause, message="stopped")
    jobs.ps(str(tmp_path / "runs"), as_json=False)
    assert capsys.readouterr().out.splitlines()[1].split()[1] == word
    assert diagnose.explain(run).startswith(f"{run}: {word}, attempt 1")
    assert Watched(run).look().shown == word
    jobs.ps(str(tmp_path / "runs"), as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["state"] == "preempted"  # as in status.json


def test_ps_without_an_answer_of_slurm_shows_the_rest(make_run, tmp_path, monkeypatch, capsys):
    def job_states(ids):
        raise slurm_client.SlurmError("squeue: no answer")

    monkeypatch.setattr(slurm_client, "job_states", job_states)
    make_run("a", job_id="7", state="running")
    jobs.ps(str(tmp_path / "runs" / "a"), as_json=True)
    out, err = capsys.readouterr()
    assert [(row["job_id"], row["job_state"], row["state"]) for row in json.loads(out)] == [("7", None, "running")]
    assert "squeue: no answer" in err


def test_ps_of_nothing(tmp_path, capsys):
    jobs.ps(str(tmp_path), as_json=False)
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    with pytest.raises(UsageError, match="no such folder"):
        jobs.ps(str(tmp_path / "none"), as_json=False)


@pytest.mark.parametrize(
    ("state", "job", "shown"),
    [
        ("pending", "FAILED", "failed"),
        ("running", "NODE_FAIL", "failed"),
        ("pending", "CANCELLED", "cancelled"),
        ("preempted", "CANCELLED", "cancelled"),
        ("preempted", "PENDING", "preempted"),
        ("running", "UNKNOWN", "running"),
    ],
)
def test_a_job_that_is_over_is_believed_more_than_what_its_run_last_said(
    state, job, shown, make_run, monkeypatch, capsys
):
    monkeypatch.setattr(slurm_client, "job_states", lambda ids: {job_id: JobState(state=job) for job_id in ids})
    run = make_run("a", job_id="7", state=state)
    jobs.ps(str(run.path), as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["job_state"]) == (shown, job)
