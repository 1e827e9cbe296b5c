"""Against what a real cluster's commands print (tests/slurm asks one itself)."""

from __future__ import annotations

import dataclasses

import pytest

from launcher.backends.slurm import admission
from launcher.backends.slurm import client as slurm_client
from launcher.errors import PreflightError
from launcher.plan import variables
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.profile import Profile
from launcher.runs.run_dir import RunDir

PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL Default=YES GraceTime=30 MaxTime=1-00:00:00 PreemptMode=REQUEUE State=UP TotalNodes=4
PartitionName=long AllowGroups=ALL Default=NO GraceTime=0 MaxTime=UNLIMITED PreemptMode=CANCEL State=UP TotalNodes=1
PartitionName=old AllowGroups=ALL Default=NO GraceTime=0 MaxTime=02:30:00 PreemptMode=OFF State=INACTIVE TotalNodes=1
"""
NODES = """\
n1|gpu*|64|512000|gpu:a100:8(S:0-1)|a100,ib|idle
n2|gpu*|64|512000|gpu:a100:8(S:0-1)|a100,ib|mixed
n3|gpu*|64|512000|gpu:a100:8|a100|down*
n4|gpu*|16|64000|gpu:t4:2,gpu:k80:1|t4|allocated
n1|long|64|512000|gpu:a100:8(S:0-1)|a100,ib|idle
n5|old|64|512000+|(null)|(null)|idle
"""
CONFIG = """\
JobFileAppend           = 0
JobRequeue              = 1
"""


@pytest.fixture
def cluster(monkeypatch):
    answers = {("scontrol", "partition"): PARTITIONS, ("scontrol", "config"): CONFIG, ("sinfo", "--Node"): NODES}
    monkeypatch.setattr(slurm_client, "run", lambda command, *more: answers[command, more[1]])
    return admission.read_cluster()


def plan_of(nodes=1, procs=8, device="cuda", **profile):
    of = {"nodes": nodes, "procs_per_node": procs, "device": device, "profile": Profile(**profile)}
    return LaunchPlan(run_id="a", name="a", **of)


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(),
        plan_of(2),
        plan_of(2, gres="gpu:a100"),
        plan_of(procs=2, gres="gpu:t4"),
        plan_of(procs=3, cpus_per_gpu=1),
        plan_of(2, constraint="ib"),
        plan_of(2, constraint="a100&ib"),
        plan_of(partition="long", timeout_min=10**6),
        plan_of(partition="gpu,long", timeout_min=10**6),
        plan_of(timeout_min=24 * 60),
        plan_of(3, procs=1, device="cpu", mem_gb=60),
    ],
)
def test_what_the_cluster_can_run_has_no_problem(plan, cluster):
    assert list(admission.find_problems(cluster, plan)) == []


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (
            plan_of(partition="gpus"),
            "partition gpus: there is none of that name; did you mean 'gpu'? valid: gpu, long, old",
        ),
        (plan_of(4), "4 nodes with 8 GPUs asked for, gpu has 3 of 4"),
        (plan_of(procs=9), "1 node with 9 GPUs asked for, gpu has 0 of 4"),
        (plan_of(procs=3, gres="gpu:t4"), "1 node with 3 GPUs (gpu:t4) asked for, gpu has 0 of 4"),
        (plan_of(3), "3 nodes asked for, 2 that fit in gpu are up (n3 down*)"),
        (plan_of(cpus_per_gpu=9), "1 node with 72 CPUs (cpus_per_gpu x workers) asked for, gpu has 0 of 4"),
        (plan_of(mem_gb=600), "1 node with 614400 MB of memory asked for, gpu has 0 of 4"),
        (plan_of(constraint="h100"), "1 node with the feature h100 asked for, gpu has 0 of 4"),
        (plan_of(timeout_min=1441), "timeout_min is 1441, more than is allowed (gpu 1440 min)"),
        (plan_of(partition="old", device="cpu", procs=1, timeout_min=150), "partition old is INACTIVE"),
        (plan_of(timeout_min=2), "lead_s is 120 s, as long as the whole time limit of 2 min"),
    ],
)
def test_what_it_cannot_run_is_said_with_what_there_is(plan, problem, cluster):
    assert list(admission.find_problems(cluster, plan)) == [problem]


@pytest.mark.parametrize(
    ("plan", "checkpoint_s", "doubts"),
    [
        (plan_of(), None, []),
        (plan_of(), 10, []),
        (plan_of(), 20, ["partition gpu gives a preempted job 30 s; a checkpoint of this run took 20.0 s"]),
        (
            plan_of(lead_s=15),
            10,
            ["lead_s is 15 s, and a checkpoint of this run has taken 10.0 s; raise it"],
        ),
        (plan_of(partition="long"), None, ["partition long answers preemption by CANCEL, not by REQUEUE"]),
    ],
)
def test_what_may_go_wrong_later_is_a_doubt(plan, checkpoint_s, doubts, cluster):
    assert list(admission.find_doubts(cluster, plan, checkpoint_s=checkpoint_s)) == doubts


def test_a_cluster_that_queues_no_job_again_by_itself_is_a_doubt(cluster, monkeypatch):
    answer = slurm_client.run
    monkeypatch.setattr(
        slurm_client, "run", lambda *command: answer(*command).replace("eue              = 1", "eue = 0")
    )
    (doubt,) = admission.find_doubts(admission.read_cluster(), plan_of(), checkpoint_s=None)
    assert "JobRequeue=0" in doubt


def test_all_problems_come_at_once_and_doubts_are_printed(cluster, tmp_path, capsys):
    run = RunDir(tmp_path)
    run.create()
    run.append_event("checkpoint", step=1, seconds=70.0)
    with pytest.raises(PreflightError) as caught:
        admission.check(plan_of(9, partition="long", timeout_min=1), run)
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) == 3
    assert "nothing was submitted" in str(caught.value)
    assert capsys.readouterr().err.count("warning: ") == 2


def test_sbatch_itself_is_asked_about_the_very_scripts(cluster, tmp_path, monkeypatch):
    answer, asked = slurm_client.run, []

    def run(*command, stdin=None):
        if command[0] != "sbatch":
            return answer(*command)
        asked.append((command, stdin))
        raise slurm_client.SlurmError("sbatch --test-only: Invalid node name specified\nTry it again")

    monkeypatch.setattr(slurm_client, "run", run)
    with pytest.raises(PreflightError) as caught:
        admission.check(plan_of(), RunDir(tmp_path / "none"), "script", "", "post")
    assert asked == [(("sbatch", "--test-only"), "script"), (("sbatch", "--test-only"), "post")]
    assert str(caught.value).splitlines()[1:] == ["  sbatch --test-only: Invalid node name specified Try it again"] * 2


def test_an_allocation_has_the_nodes_that_it_has(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    admission.check_step(plan_of(2))
    with pytest.raises(PreflightError, match=r"--nodes 3: the allocation 7 holds 2; .*--nodes 2"):
        admission.check_step(plan_of(3))


def test_an_allocation_has_the_cpus_and_gpus_that_it_has(monkeypatch):
    for name, value in {
        "JOB_ID": "7",
        "JOB_NUM_NODES": "3",
        "JOB_CPUS_PER_NODE": "64(x2),8",
        "GPUS_ON_NODE": "4",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    admission.check_step(plan_of(2, procs=4, cpus_per_gpu=16))
    with pytest.raises(PreflightError) as caught:
        admission.check_step(plan_of(3, procs=8, cpus_per_gpu=8))
    cpus, gpus, last = str(caught.value).splitlines()
    assert "64 CPUs per node (cpus_per_gpu x workers: 8 x 8): the allocation 7 holds 8; ask for more" in cpus
    assert "--cpus-per-task=64) or give a profile with cpus_per_gpu: 1" in cpus
    assert "--gpus 8: the allocation 7 holds 4 per node" in gpus
    assert last == "nothing was started"


def test_a_profile_that_keeps_the_shells_variables_from_the_job_is_a_doubt(cluster, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    (doubt,) = admission.find_doubts(cluster, plan_of(sbatch={"export": "NONE"}), checkpoint_s=None)
    assert "sbatch.export: NONE in the profile keeps what is set here from the job: " in doubt
    assert "NCCL_DEBUG" in doubt
    assert list(admission.find_doubts(cluster, plan_of(sbatch={"export": "ALL,A=1"}), checkpoint_s=None)) == []


def test_what_becomes_of_sbatchs_variables_is_said():
    said = {"SBATCH_ACCOUNT": "a", "SBATCH_PARTITION": "p", "SBATCH_MEM_PER_NODE": "1G", "SBATCH_HINT": "nomultithread"}
    assert list(variables.notes(said, Profile(account="a", partition="gpu"))) == [
        "SBATCH_ACCOUNT: the job's account is a",
        "SBATCH_PARTITION=p is ignored: the profile's partition is gpu",
        "SBATCH_MEM_PER_NODE=1G is ignored; its place is the profile's mem_gb",
        "SBATCH_HINT=nomultithread is ignored; its place is the profile: sbatch: {hint: nomultithread}",
    ]


def test_a_node_that_does_not_answer_is_not_usable(cluster):
    node = cluster.nodes[0]
    assert node.usable
    for state in ("down*", "drained", "draining", "idle*", "maint", "fail"):
        assert not dataclasses.replace(node, state=state).usable


def test_a_cluster_that_does_not_answer_is_said_before_anything_is_written(launch, recipe_file):
    """`launch` of its own, on a PATH without SLURM."""
    text = "data: {name: digits}\nmodel: {arch: resnet18, weights: null}\n"
    done = launch(str(recipe_file(text)), "--backend", "slurm", "--procs", "1", "--profile", "dev")
    assert done.returncode == 3
    assert "scontrol: not found; SLURM's commands are on PATH where jobs are submitted" in done.stderr
    assert list(launch.cwd.iterdir()) == []
