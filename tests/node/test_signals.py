"""Stop signals at any moment of a job, and twice; tests/commands/test_launch.py has them in the middle of training."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from launcher.backends.slurm import submit as slurm
from launcher.backends.slurm import task
from launcher.errors import InterruptedRunError
from launcher.node import signals, supervisor
from launcher.node.signals import StopSignals
from launcher.runs import quarantine
from launcher.runs.history import events
from launcher.system import processes


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in processes.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals._held.clear()


def test_a_signal_before_a_job_trains_is_heeded_and_one_after_it_ends_nothing(make_run, monkeypatch):
    run = make_run("a", state="pending")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setattr(quarantine, "prepare", lambda *_, **__: pytest.fail("it should leave before"))

    def supervise(_run):
        os.kill(os.getpid(), signal.SIGUSR2)
        try:
            with StopSignals(run, node_rank=0) as stop:
                assert (stop.requested, stop.reason) == (True, "stopped by SIGUSR2")
                supervisor._check_images(run, 0, stop, 1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(task, "_supervise", supervise)
    with pytest.raises(SystemExit) as left:
        task.main(str(run.path))
    assert left.value.code == 75
    assert run.job_done("7-0-0").read_text() == "75\n"
    assert run.read_status()["state"] == "preempted"
    assert [event["signal"] for event in events(run, "signal")] == ["SIGUSR2"]


@pytest.mark.parametrize("times", [1, 2])
def test_in_an_allocation_the_first_ctrl_c_saves_and_the_second_ends_the_step(times, make_run, tmp_path):
    run = make_run("a", state="running")
    srun = f"""
        trap 'echo USR2 >> {tmp_path}/said; [ {times} = 2 ] || exit 75' USR2
        trap 'echo TERM >> {tmp_path}/said; exit 143' TERM
        touch {tmp_path}/ready
        for _ in $(seq 1000); do sleep 0.1; done
    """

    def press():
        for file in ["ready", "said"][:times]:
            while not (tmp_path / file).exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(InterruptedRunError, match="launch resume"):
        slurm._run_step(run, SimpleNamespace(command=("bash", "-c", srun), profile=None))
    assert (tmp_path / "said").read_text().split() == ["USR2", "TERM"][:times]
    assert run.read_status()["state"] == "preempted"


def test_what_binds_the_shell_of_an_allocation_binds_no_worker(make_run, monkeypatch):
    monkeypatch.setenv("SLURM_CPU_BIND_TYPE", "mask_cpu:")
    command = ("bash", "-c", '[ -z "$SLURM_CPU_BIND_TYPE" ]')
    assert slurm._run_step(make_run("a", state="completed"), SimpleNamespace(command=command, profile=None)) == 0


def test_steps_of_one_allocation_choose_other_ports(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    seeds = []
    for step in ("0", "1"):
        monkeypatch.setenv("SLURM_STEP_ID", step)
        seeds.append(task._seed())
    assert seeds[0] == 7
    assert seeds[1] != 7


def press(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_a_lost_node_is_forgotten_where_the_run_goes_on_and_a_signal_is_not(make_run):
    with StopSignals(make_run("a"), node_rank=0, outlives_loss=True) as stop:
        stop.request(reason="node 1 is gone", cause="lost_node")
        stop.forget_loss()
        assert (stop.requested, stop.reason, stop.cause) == (False, "", "")
        stop.request(reason="node 2 is gone", cause="lost_node")
        press(signal.SIGINT)  # the first one, though a stop is under way
        assert (stop.reason, stop.cause) == ("stopped by SIGINT", "interrupted")
        stop.blame("node 2 is gone")
        stop.forget_loss()
        assert (stop.requested, stop.reason, stop.cause) == (True, "stopped by SIGINT", "interrupted")


def test_children_are_told_again_of_a_stop_that_comes_after_one_that_was_forgotten(make_run):
    told = []
    with (
        StopSignals(make_run("a"), node_rank=0, outlives_loss=True) as stop,
        subprocess.Popen(["sleep", "600"]) as child,
    ):
        stop.request(reason="node 1 is gone", cause="lost_node")
        told.append(child.wait(timeout=100))
        stop.forget_loss()
        time.sleep(2 * signals.RESEND_S)
        with subprocess.Popen(["sleep", "600"]) as second:
            time.sleep(2 * signals.RESEND_S)
            assert second.poll() is None
            press(signal.SIGTERM)
            told.append(second.wait(timeout=100))
    assert told == [-signal.SIGTERM] * 2
