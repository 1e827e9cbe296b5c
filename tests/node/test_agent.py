"""What the agent writes down of its attempts. Whole runs under it: tests/commands/test_launch.py, tests/faults."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from launcher.node import agent, preflight
from launcher.node.agent_thread import LeftError
from launcher.node.part import Part
from launcher.node.signals import StopSignals
from launcher.plan.launch_plan import LaunchPlan
from launcher.runs import history
from launcher.runs.heartbeats import Heartbeats
from launcher.runs.run_dir import RunDir
from launcher.system import memory as host_memory
from launcher.system.files import write_json_atomic


@pytest.fixture
def kernel(monkeypatch):
    """One whose kills are as many as a test says."""
    found = SimpleNamespace(kills=3)
    monkeypatch.setattr(host_memory, "num_kills", lambda: found.kills)
    return found


def environments():
    """Of two workers, as torch's agent makes them."""
    return {local_rank: {"RANK": str(local_rank)} for local_rank in (0, 1)}


@pytest.fixture
def started(tmp_path):
    """A run, what torch's agent asks at each start of its workers, and their beats."""
    run = RunDir(tmp_path / "run")
    run.create()
    beats, stop = Heartbeats(2), SimpleNamespace(requested=False)
    logs = agent._attempt_logs(run, Part(), node_rank=0, first_attempt=1, stop=stop, beats=beats)
    logs.reify(environments())
    return run, logs, beats, stop


def kills(run):
    return [event["attempt"] for event in history.events(run, "memory_kill")]


def test_a_worker_that_is_killed_in_training_is_written_down_for_its_attempt(kernel, started):
    run, logs, beats, _ = started
    beats.begin(host_memory.num_kills())
    kernel.kills += 1
    logs.reify(environments())
    assert kills(run) == [1]
    (ended,) = history.events(run, "attempt_ended")
    assert (ended["attempt"], ended["cause"]) == (1, "memory_kill")
    beats.begin(host_memory.num_kills())
    logs.note_kill()  # the second attempt ended otherwise
    assert kills(run) == [1]


def test_a_probe_that_is_killed_is_no_worker_that_is(kernel, started):
    run, logs, beats, _ = started
    kernel.kills += 2
    logs.note_kill()  # ended before it trained
    beats.begin(host_memory.num_kills())
    logs.note_kill()
    assert kills(run) == []
    kernel.kills += 1
    beats.begin(host_memory.num_kills())  # the other worker comes a moment later
    logs.note_kill()
    assert kills(run) == [1]


def test_a_kill_is_written_down_once_also_where_no_attempt_follows(kernel, started):
    run, logs, beats, stop = started
    beats.begin(host_memory.num_kills())
    kernel.kills += 1
    stop.requested = True
    with pytest.raises(agent._NoRestartError):
        logs.reify(environments())
    logs.note_kill()  # as run_workers does in the end
    assert kills(run) == [1]


def end(run, logs, kind, **event):
    """An attempt ends by a kind of error, and its workers are to be started again."""
    if event:
        run.append_event("checkpoint", attempt=logs.attempt, **event)
    error = {"time": logs.attempt, "attempt": logs.attempt, "rank": 0, "node": 0, "host": "n1", "kind": kind}
    write_json_atomic(run.rank_error(logs.attempt, 0), error | {"type": kind, "message": "a test", "traceback": ""})
    logs.reify(environments())


def test_workers_that_hang_twice_without_a_new_step_are_not_started_a_third_time(kernel, started):
    run, logs, *_ = started
    end(run, logs, "hang", step=3)
    end(run, logs, "hang", step=6)
    end(run, logs, "hang")
    with pytest.raises(agent._NoRestartError, match=r"2 attempts in a row ended at step 6 \(hang, hang\)"):
        end(run, logs, "hang")
    assert len(history.events(run, "attempt_started")) == 4


def test_how_often_a_worker_may_vanish_is_for_max_restarts_to_say(kernel, started):
    run, logs, *_ = started
    for _ in range(9):
        end(run, logs, "peer_lost")
    assert {event["cause"] for event in history.events(run, "attempt_ended")} == {"lost_worker"}


@pytest.fixture
def cuda_counts_by_itself(monkeypatch):
    """No NVML, or a MIG slice: torch counts GPUs by CUDA, after which CUDA works in no process that this one forks."""
    here = os.getpid()

    def count():
        assert os.getpid() != here, "CUDA was touched in the process that forks"
        return 2

    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: -1)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", count)
    monkeypatch.setattr(torch.cuda, "_cached_device_count", None)
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))


def test_the_process_that_forks_workers_counts_no_gpus_by_cuda(cuda_counts_by_itself, started):
    from torch.distributed.launcher.api import elastic_launch

    _, logs, *_ = started
    plan = LaunchPlan(run_id="a", device="cuda", procs_per_node=2, max_restarts=0, rdzv_endpoint="127.0.0.1:0")
    config = agent._config(plan, logs)
    assert elastic_launch(config, os.getpid)().keys() == {0, 1}  # two workers, forked by torch's agent


def test_a_check_of_nodes_counts_gpus_in_a_child(cuda_counts_by_itself, monkeypatch):
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 7))
    monkeypatch.setattr(preflight, "_driver", lambda: "580")
    facts = preflight.gather(LaunchPlan(run_id="a", device="cuda", procs_per_node=2), seed=1)
    assert (facts.num_gpus, facts.nccl) == (2, "2.30.7")


def test_a_driver_that_ends_whoever_asks_it_shows_no_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: os._exit(9))
    monkeypatch.setattr(preflight, "_driver", lambda: "580")
    assert preflight.gather(LaunchPlan(run_id="a", device="cuda", procs_per_node=2), seed=1).num_gpus == 0


def test_a_store_that_dies_while_the_agents_meet_is_a_lost_node(tmp_path, monkeypatch):
    """As where the node that has it is killed in just that moment: the agent's thread gets torch's own error."""
    import torch.distributed as dist
    from torch.distributed.launcher import api

    def meet(*_):
        raise dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed.")

    monkeypatch.setattr(api, "elastic_launch", lambda _config, _main: meet)
    run = RunDir(tmp_path / "run")
    run.create()
    stop = StopSignals(run, node_rank=1, outlives_loss=True)
    plan = LaunchPlan(run_id="a", nodes=2, node_rank=1, rdzv_endpoint="127.0.0.1:1", address="127.0.0.1")
    with pytest.raises(LeftError):
        agent.run_workers(run, plan, first_attempt=1, stop=stop)
    assert stop.cause == "lost_node"
    assert "node 0" in stop.reason


LEAN = """
import sys
from launcher.node import agent
from launcher.plan.launch_plan import LaunchPlan
from launcher.system import lazy_dynamo
def stop_here(*_):
    assert lazy_dynamo.is_put_off()
    assert "launcher.engine.worker" in sys.modules
    assert "sympy" not in sys.modules
    sys.exit(0)
agent._log_to_file = stop_here
agent.run_workers(None, LaunchPlan(run_id="r"), first_attempt=1, stop=None)
"""


def test_a_node_that_imports_torch_itself_imports_no_compiler():
    """As one of a SLURM job does, or a run in the background."""
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_rendezvous_names_its_methods_as_torch_does():
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    def record():
        return dynamic_rendezvous.get_method_name()

    def next_rendezvous():
        return record()

    before = next_rendezvous()
    agent._name_methods_quickly()
    assert dynamic_rendezvous.get_method_name.__module__ == agent.__name__
    assert next_rendezvous() == before == "next_rendezvous"
