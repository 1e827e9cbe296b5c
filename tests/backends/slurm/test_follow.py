"""How a job's end is told, and when its next start is brought forward; tests/slurm has it all on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from launcher.backends.slurm import client as slurm_client
from launcher.backends.slurm import follow as slurm_follow
from launcher.errors import InterruptedRunError, PreflightError, TrainingError
from launcher.runs.whereabouts import JobState


@pytest.fixture
def slurm(monkeypatch):
    """Set what SLURM says of job 7, and its exit code."""

    def say(state, code=0):
        monkeypatch.setattr(slurm_client, "job_states", lambda ids: {i: JobState(job_id=i, state=state) for i in ids})
        monkeypatch.setattr(slurm_client, "exit_code", lambda _: code)

    return say


@pytest.mark.parametrize(
    ("state", "job", "code", "error", "message", "after"),
    [
        ("completed", "COMPLETED", 0, None, "", "completed"),
        ("completed", "UNKNOWN", 0, None, "", "completed"),
        ("pending", "FAILED", 1, TrainingError, "ended before training began", "failed"),
        ("pending", "FAILED", 3, PreflightError, "ended before training began", "failed"),
        ("pending", "CANCELLED", 0, InterruptedRunError, "was cancelled; go on with: launch resume", "cancelled"),
        ("preempted", "CANCELLED", 0, InterruptedRunError, "was cancelled; go on with: launch resume", "cancelled"),
        ("preempted", "FAILED", 75, InterruptedRunError, "ended as FAILED; go on with: launch resume", "preempted"),
        ("preempted", "FAILED", 1, TrainingError, "ended as FAILED", "preempted"),
        ("running", "NODE_FAIL", 1, TrainingError, "ended as NODE_FAIL", "failed"),
        ("running", "PREEMPTED", 0, InterruptedRunError, "ended as PREEMPTED; go on with: launch resume", "preempted"),
        ("completed", "CANCELLED", 0, InterruptedRunError, "its exports: launch export", "completed"),
    ],
)
def test_a_jobs_end_is_told_and_written_down(state, job, code, error, message, after, make_run, slurm):
    run = make_run("a", job_id="7", state=state)
    slurm(job, code)
    if error:
        with pytest.raises(error, match=message):
            slurm_follow.conclude(run, "7")
    else:
        slurm_follow.conclude(run, "7")
    assert run.read_status()["state"] == after


@pytest.mark.parametrize(("job", "error"), [("CANCELLED", InterruptedRunError), ("FAILED", TrainingError)])
def test_the_end_of_the_job_that_makes_the_exports_has_its_own_cure(job, error, make_run, slurm):
    run = make_run("a", state="completed")
    run.batch_log("8").write_text("onnx is missing\n")
    slurm(job, 1)
    with pytest.raises(error, match="launch export") as caught:
        slurm_follow.conclude_post(run, "8")
    assert "launch resume" not in str(caught.value)
    assert ("onnx is missing" in str(caught.value)) == (job == "FAILED")
    assert run.read_status()["state"] == "completed"


def test_a_job_that_was_preempted_for_good_is_not_followed_any_further(slurm, monkeypatch, tmp_path):
    slurm("PREEMPTED")
    monkeypatch.setattr(slurm_follow.time, "sleep", lambda _: pytest.fail("it is over"))
    slurm_follow.follow("7", tmp_path / "log")


def test_only_a_job_that_has_run_before_is_started_early(make_run, monkeypatch, tmp_path):
    """A first BeginTime is the user's own (sbatch --begin)."""
    waits, runs, over = (
        JobState(job_id="7", state=state, reason=reason)
        for state, reason in (("PENDING", "BeginTime"), ("RUNNING", "None"), ("COMPLETED", "None"))
    )
    states = [waits, waits, runs, waits, waits, runs, over]
    calls = []
    monkeypatch.setattr(slurm_client, "job_states", lambda _: {"7": states.pop(0)})
    monkeypatch.setattr(slurm_client, "run", lambda *command: calls.append((command, len(states))))
    monkeypatch.setattr(slurm_follow.time, "sleep", lambda _: None)
    slurm_follow.follow("7", tmp_path / "log")
    assert calls == [(("scontrol", "update", "JobId=7", "StartTime=now+5"), 3)]


SUBMIT = """
import sys
from launcher.backends.slurm import submit
from launcher.errors import exit_code_of
from launcher.plan.launch_plan import LaunchPlan
from launcher.system import console

console.protect()
plan = LaunchPlan(run_id="a", name="a", run_dir=sys.argv[1], backend="slurm", script="#!/bin/sh\\n")
sys.exit(exit_code_of(lambda: submit.submit(plan)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("slow", ["squeue", "sbatch"])
def test_a_stop_signal_ends_the_following_and_not_the_job(number, slow, make_run, tmp_path):
    """Commands that answer as SLURM's do; tests/slurm has the cluster."""
    commands = {
        "sbatch": "echo 7",
        "squeue": "echo '7|RUNNING|None|N/A|n1'",
        "scancel": f'echo "$@" > {tmp_path}/cancelled',
    }
    if slow == "sbatch":
        commands["sbatch"] = "sleep 3; echo 7"
        commands["squeue"] = f"printf '%-20s%-300s%-4096s\\n' 7 a {tmp_path}/runs/a/logs/slurm-7.log"
    for name, does in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/asked-{name}\n{does}\n")
        (tmp_path / name).chmod(0o755)
    run = make_run("a", state="pending")
    process = subprocess.Popen(
        [sys.executable, "-c", SUBMIT, str(run.path)],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / f"asked-{slow}").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    if slow == "squeue":
        assert process.returncode == 0, errors
        assert f"job 7 goes on. Follow it by: launch logs {run} -f; stop it by: launch cancel {run}" in said
        assert not (tmp_path / "cancelled").exists()
    else:  # nobody would know of a job whose number has not come yet
        assert (process.returncode, errors.strip()) == (130, "interrupted")
        assert (tmp_path / "cancelled").read_text() == "7\n"
        assert run.read_status()["state"] == "failed"
