"""What plan.json holds is read as a plan again, also where another version of the launcher has written it."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from launcher.plan.launch_plan import Launched, LaunchPlan
from launcher.plan.profile import Profile
from launcher.runs.run_dir import RunDir

PLAN = LaunchPlan(
    run_id="a-1",
    name="a",
    run_dir="/runs/a",
    backend="slurm",
    device="cuda",
    nodes=2,
    procs_per_node=8,
    threads_per_proc=4,
    export_threads=2,
    max_restarts=3,
    preflight=True,
    hang_timeout_s=600.0,
    node_rank=1,
    rdzv_endpoint="n1:29400",
    detach=True,
    env={"OMP_NUM_THREADS": "4"},
    command=("srun", "python"),
    profile=Profile(name="gpus", partition="gpu", env={"A": "1"}, setup=["module load cuda"]),
    post_job=True,
)


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def test_a_plan_is_read_as_it_was_written(run):
    launched = Launched(created=1.5, code="abc", host="login", pid=7, process_started="9", variables=["NCCL_DEBUG"])
    run.write_plan(replace(PLAN, script="#!", post_script="#!", recipe={"name": "a"}, address="10.0.0.1"), launched)
    assert run.read_plan() == PLAN
    assert run.read_launched() == launched
    assert run.read_plan().world_size == json.loads(run.plan.read_text())["world_size"] == 16


def test_fields_that_a_plan_lacks_have_defaults_and_unknown_ones_are_ignored(run):
    run.plan.write_text(json.dumps({"run_id": "a-1", "later": 1, "profile": {"lead_s": 9, "later": 1}}))
    assert run.read_plan() == LaunchPlan(run_id="a-1", profile=Profile(lead_s=9))
    assert run.read_launched() == Launched()


def test_every_field_of_plan_json_but_the_run_may_be_absent(run):
    run.write_plan(PLAN, Launched())
    whole = json.loads(run.plan.read_text())
    for name in whole.keys() - {"run_id"}:
        run.plan.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        found = run.read_plan()
        assert all(
            getattr(found, f.name) == getattr(PLAN, f.name) for f in fields(found) if f.name not in (name, "nodes")
        )
