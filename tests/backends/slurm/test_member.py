"""One node of a job that shrinks and grows: what it says at its end, and which nodes train.

On a cluster: tests/faults/nodes.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.backends.slurm import client as slurm_client
from launcher.backends.slurm import member, node_start
from launcher.errors import InterruptedRunError, PreflightError, TrainingError
from launcher.node import preflight, signals, supervisor
from launcher.runs.generations import Generation, Generations, Member
from launcher.runs.run_dir import BATCH_LOG_VARIABLE
from launcher.system.files import write_json_atomic

HOSTS = ["n0", "n1", "n2", "n3"]
START = "7-0"


@pytest.fixture
def job(make_run, monkeypatch):
    """A run of three nodes, two at least, and a spare one, as job 7; its nodes' supervisors only note their plans."""
    run = make_run("a", job_id="7", state="running")
    plan = replace(run.read_plan(), backend="slurm", nodes=3, min_nodes=2, spares=1, preflight=True)
    run.write_plan(plan, run.read_launched())
    run.slurm.mkdir(exist_ok=True)
    monkeypatch.setattr(signals, "hold", lambda: None)
    monkeypatch.setattr(node_start, "with_address", lambda plan, toward: replace(plan, address="127.0.0.1"))
    monkeypatch.setattr(node_start, "begin", lambda run: None)
    variables = {"JOB_ID": "7", "JOB_NODELIST": "n[0-3]", "JOB_NUM_NODES": "4", "PROCID": "0", "LOCALID": "0"}
    variables |= {"NTASKS": "1", "NNODES": "4", "NODEID": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv(BATCH_LOG_VARIABLE, raising=False)
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJobEnvironment.hostnames", HOSTS)
    plans = []
    monkeypatch.setattr(supervisor, "supervise", lambda plan, start: plans.append(plan) or 0)
    monkeypatch.setattr(preflight, "run", lambda folder, plan, **_: {})
    run.plans = plans
    return run


def end(run, node):
    return member.main([str(run.path), "--start", START, "--node", str(node)])


def decide(run, *nodes, number=1):
    generations = Generations(run, START)
    generations.folder.mkdir(parents=True, exist_ok=True)
    members = tuple(Member(node=node, host=HOSTS[node], start=str(node)) for node in nodes)
    write_json_atomic(run.meeting(START), {})
    assert generations.make(Generation(number=number, members=members))


def said(run):
    return {file.name.removeprefix(f"{START}-"): file.read_text().strip() for file in run.slurm.glob("done-*")}


def ends_with(error, monkeypatch):
    def supervise(plan, start):
        raise error

    monkeypatch.setattr(supervisor, "supervise", supervise)


def test_the_node_that_holds_rank_0_at_the_end_speaks_for_the_run(job):
    assert end(job, 0) == 0
    assert said(job) == {f"done-{START}-0000": "0"}  # nobody has trained yet: it is the first one's to say
    decide(job, 1, 2)
    for node in (0, 2):
        assert end(job, node) == 0
    assert len(said(job)) == 1
    assert end(job, 1) == 0
    assert said(job)[f"done-{START}-0001"] == "0"
    assert job.node_left(START, 2).read_text() == "0\n"


@pytest.mark.parametrize(("state", "speaks"), [("failed", True), ("running", False)])
def test_where_the_run_has_failed_any_node_says_so(state, speaks, job, monkeypatch):
    decide(job, 1, 2)
    job.update_status(state=state)
    ends_with(TrainingError("no new step"), monkeypatch)
    assert end(job, 2) == 1
    assert said(job) == ({f"done-{START}-0001": "1"} if speaks else {})


@pytest.mark.parametrize(("code", "command"), [(0, ("scancel", "7")), (75, ("scontrol", "requeue", "7"))])
@pytest.mark.parametrize("nodes", ["n[1-3]", "n[0-3]"])
def test_the_node_that_speaks_does_what_a_lost_batch_script_cannot(nodes, code, command, job, monkeypatch):
    monkeypatch.setenv(BATCH_LOG_VARIABLE, "log")
    state = slurm_client.JobState(job_id="7", state="RUNNING", nodes=nodes)
    monkeypatch.setattr(slurm_client, "job_states", lambda ids: {"7": state})
    calls = []

    def run(*words):
        calls.append(words)
        left = HOSTS[1:] if nodes == "n[1-3]" else HOSTS
        return {"scontrol": "\n".join(left), "sinfo": "mixed\n"}.get(words[0], "")

    monkeypatch.setattr(slurm_client, "run", run)
    decide(job, 1, 2)
    job.node_left(START, "script").touch()  # it hears, but cannot speak to SLURM any more
    if code:
        ends_with(InterruptedRunError("too few nodes"), monkeypatch)
    assert end(job, 1) == code
    assert (command in calls) == (nodes == "n[1-3]")


def test_bad_nodes_are_left_out_where_enough_are_good(job, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "run", lambda folder, plan, **_: {"n1": "too old"} if plan.nodes == 4 else {})
    assert [end(job, node) for node in (0, 2, 3)] == [0, 0, 0]
    assert {plan.members for plan in job.plans} == {(0, 2, 3)}
    assert "the run begins without these: n1: too old" in capsys.readouterr().out
    assert job.bad_nodes(START, 0).read_text() == "n1\n"  # for a requeue
    assert end(job, 1) == 3
    assert job.node_left(START, 1).read_text() == "3\n"  # it is not started again
    assert said(job) == {f"done-{START}-0000": "0"}


def test_where_too_few_are_good_the_job_ends(job, monkeypatch):
    monkeypatch.setattr(preflight, "run", lambda folder, plan, **_: dict.fromkeys(HOSTS[1:], "too old"))
    assert [end(job, node) for node in range(4)] == [3, 3, 3, 3]
    assert job.plans == []
    assert said(job) == {f"done-{START}-0000": "3"}


def test_a_supervisor_that_is_started_again_asks_nobody_and_joins(job, monkeypatch):
    assert end(job, 0) == 0
    for name, thing in (("run", preflight), ("begin", node_start)):
        monkeypatch.setattr(thing, name, lambda *_, **__: pytest.fail("it was done before"))
    job.preflight(START).mkdir()
    write_json_atomic(job.preflight(START) / "node-0.json", {})
    assert end(job, 0) == 0
    assert [plan.node_rank for plan in job.plans] == [0, 0]


def test_where_the_first_node_refuses_the_run_the_others_leave(job, monkeypatch):
    def begin(run):
        raise TrainingError("three attempts in vain")

    monkeypatch.setattr(node_start, "begin", begin)
    assert end(job, 0) == 1
    assert end(job, 1) == 0
    assert job.plans == []
    assert said(job) == {f"done-{START}-0000": "1"}


def test_a_node_without_the_network_is_named_and_not_started_again(job, monkeypatch):
    def with_address(plan, toward):
        raise PreflightError("vm: has no interface ib0")

    end(job, 0)
    monkeypatch.setattr(node_start, "with_address", with_address)
    monkeypatch.setattr(member, "node_name", lambda: "vm")
    assert end(job, 2) == 3
    assert job.bad_nodes(START, 2).read_text() == "vm\n"
