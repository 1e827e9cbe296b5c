"""`launch ps` and `launch cancel` without SLURM; tests/slurm has them on a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from launcher import processes, slurm_client
from launcher.commands import jobs
from launcher.errors import UsageError
from launcher.run_dir import RunDir, write_json_atomic
from launcher.slurm_client import JobState


@pytest.fixture
def make_run(tmp_path):
    def make(name, *, job_id=None, pid=0, started="0", host=None, **status):
        run = RunDir(tmp_path / "runs" / name)
        run.create()
        run.recipe.write_text("name: a\n")
        facts = {"host": host or os.uname().nodename, "pid": pid, "process_started": started}
        write_json_atomic(run.plan, {"run_id": name, **facts})
        run.update_status(**status)
        if job_id:
            run.append_event("submitted", job_id=job_id)
        return run

    return make


BEST = {"metric": "val/top1", "value": 0.98765, "epoch": 1, "step": 10}


def test_ps_shows_every_run_below_a_folder_with_its_job(make_run, tmp_path, monkeypatch, capsys):
    asked = []

    def job_states(ids):
        asked.extend(ids)
        return {job_id: JobState(state="RUNNING") for job_id in ids}

    monkeypatch.setattr(slurm_client, "job_states", job_states)
    make_run("a", job_id="7", state="completed", attempt=1, epoch=3, step=9, best=BEST)
    make_run("group/b", job_id="8", state="running", attempt=2, epoch=0, step=4, best=None)
    make_run("c", state="running")
    (tmp_path / "runs" / "no-run").mkdir()
    jobs.ps(str(tmp_path / "runs"), as_json=False)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["RUN", "STATE", "JOB", "ATTEMPT", "EPOCH", "STEP", "BEST", "UPDATED"]
    found = {line.split()[0].rsplit("/", 1)[1]: line.split()[1:] for line in lines}
    assert found["a"][:6] == ["completed", "7", "1", "3", "9", "val/top1"]
    assert found["a"][6] == "0.9877"
    assert found["b"][:6] == ["running", "8", "RUNNING", "2", "0", "4"]
    assert found["c"][:5] == ["running", "-", "-", "-", "-"]
    assert asked == ["8"]  # what is over is not asked for


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


def test_cancel_ends_the_process_that_was_launched_and_no_other_of_its_number(make_run, monkeypatch):
    own, other = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2))
    try:
        monkeypatch.setattr(jobs.time, "sleep", lambda _: own.poll())  # as its parent would see that it is gone
        run = make_run("a", pid=own.pid, started=processes.start_time(own.pid), state="running")
        jobs.cancel(run)
        assert own.wait(timeout=20) == -signal.SIGTERM
        assert run.read_status()["state"] == "cancelled"
        stale = make_run("b", pid=other.pid, started="1", state="running")
        jobs.cancel(stale)
        assert other.poll() is None
        assert stale.read_status()["state"] == "cancelled"
    finally:
        for process in (own, other):
            process.kill()
            process.wait()


def test_cancel_says_what_it_cannot(make_run):
    with pytest.raises(UsageError, match="completed already"):
        jobs.cancel(make_run("a", state="completed"))
    with pytest.raises(UsageError, match="runs on elsewhere; cancel it there"):
        jobs.cancel(make_run("b", host="elsewhere", state="running"))
