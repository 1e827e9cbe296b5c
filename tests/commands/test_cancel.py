"""`launch cancel` without SLURM; tests/slurm has it on a cluster."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from launcher.backends.slurm import client as slurm_client
from launcher.commands import cancel
from launcher.errors import UsageError
from launcher.plan import batch_script
from launcher.runs.whereabouts import JobState
from launcher.system import processes, waiting


@pytest.fixture
def slurm(monkeypatch):
    """Jobs that are RUNNING unless their state is set, and that scancel ends."""
    jobs = {}

    def run(command, *job_ids):
        assert command == "scancel"
        jobs.update(dict.fromkeys(job_ids, "CANCELLED"))

    monkeypatch.setattr(slurm_client, "run", run)
    monkeypatch.setattr(
        slurm_client,
        "job_states",
        lambda ids: {i: JobState(job_id=i, state=jobs.setdefault(i, "RUNNING")) for i in ids},
    )
    return jobs


@pytest.fixture
def processes_of_mine(monkeypatch):
    started = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    # Polled as its parent would, to see that it is gone.
    monkeypatch.setattr(waiting.time, "sleep", lambda _: [process.poll() for process in started])
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_the_process_that_was_launched_is_ended_and_no_other_of_its_number(make_run, processes_of_mine):
    own, other = processes_of_mine
    run = make_run("a", pid=own.pid, started=processes.start_time(own.pid), state="running")
    cancel.run(str(run.path))
    assert own.wait(timeout=60) == -signal.SIGTERM
    assert run.read_status()["state"] == "cancelled"
    stale = make_run("b", pid=other.pid, started="1", state="running")
    cancel.run(str(stale.path))
    assert other.poll() is None
    assert stale.read_status()["state"] == "cancelled"


def test_a_run_that_goes_on_here_is_ended_here_whatever_job_it_once_was(make_run, slurm, processes_of_mine):
    own, _ = processes_of_mine
    run = make_run("a", job_id="7", pid=own.pid, started=processes.start_time(own.pid), state="running")
    slurm["7"] = "COMPLETED"
    run.append_event("launched", backend="torchrun")
    cancel.run(str(run.path))
    assert own.wait(timeout=60) == -signal.SIGTERM


def test_a_job_is_ended_with_the_one_that_waits_to_make_its_exports(make_run, slurm, capsys):
    run = make_run("a", job_id="7", state="running")
    run.append_event("post_submitted", job_id="8")
    cancel.run(str(run.path))
    assert slurm == {"7": "CANCELLED", "8": "CANCELLED"}
    assert run.read_status()["state"] == "cancelled"
    assert "go on with: launch resume" in capsys.readouterr().out


def test_of_a_trained_run_the_job_that_makes_the_exports_is_ended(make_run, slurm, capsys):
    run = make_run("a", job_id="7", state="completed")
    run.append_event("post_submitted", job_id="8")
    slurm["7"] = "COMPLETED"
    cancel.run(str(run.path))
    assert slurm == {"7": "COMPLETED", "8": "CANCELLED"}
    assert run.read_status()["state"] == "completed"
    assert "launch export" in capsys.readouterr().out


def test_a_sweeps_runs_are_ended_together(make_run, slurm):
    runs = [make_run(f"sweep/{name}", job_id=f"7_{name}", state="pending") for name in range(3)]
    runs[0].update_status(state="completed")
    slurm["7_0"] = "COMPLETED"
    folder = runs[0].path.parent
    (folder / batch_script.RUNS).write_text("".join(f"/before/it/was/moved/{run.path.name}\n" for run in runs))
    cancel.run(str(folder))
    assert [run.read_status()["state"] for run in runs] == ["completed", "cancelled", "cancelled"]
    with pytest.raises(UsageError, match=r"all of its runs are over already \(1 completed, 2 cancelled\)"):
        cancel.run(str(folder))


def test_what_cannot_be_cancelled_is_said(make_run, slurm, tmp_path):
    with pytest.raises(UsageError, match="completed already"):
        cancel.run(str(make_run("a", state="completed").path))
    with pytest.raises(UsageError, match="runs on elsewhere; cancel it there"):
        cancel.run(str(make_run("b", host="elsewhere", state="running").path))
    slurm["7"] = "FAILED"
    with pytest.raises(UsageError, match="failed already"):
        cancel.run(str(make_run("c", job_id="7", state="pending").path))
    with pytest.raises(UsageError, match="not a run directory"):
        cancel.run(str(tmp_path / "runs"))
