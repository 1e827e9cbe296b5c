"""Plans are data: tests/golden holds whole ones; UPDATE_GOLDEN=1 pytest tests/plan/test_plan.py writes them anew."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher import cli, start
from launcher.errors import UsageError
from launcher.plan import plan as plans
from launcher.plan import topology
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.plan import make_plan
from launcher.plan.profile import Profile
from launcher.plan.request import Request
from launcher.plan.topology import Topology
from launcher.recipe import checks as recipe_checks
from launcher.recipe import load as recipes
from launcher.recipe import schema as recipe_schema

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"
LAPTOP = Topology(num_cores=2, num_gpus=0, host="laptop")
SERVER = Topology(num_cores=64, num_gpus=8, host="server")
LOGIN = Topology(num_cores=4, num_gpus=0, host="login", has_slurm=True, python="/venv/bin/python", cwd="/home/me")
TWO_NODES = ("--nodes", "2", "--gpus", "8")


def plan_of(launch, machine=LAPTOP, **request):
    """The plan of a recipe whose ``launch`` is given."""
    recipe = recipes.from_dict({"data": {"name": "digits"}, "launch": launch})
    assert list(recipe_checks._placement(recipe)) == []
    return make_plan(recipe, machine, Request(run_id="r-1", **request))


@pytest.fixture
def dry_run(monkeypatch, capsys, tmp_path, images):
    """Run `launch … --dry-run` here as if on another machine; return the plan it made and what it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(images)
    monkeypatch.setattr(start, "new_run_id", lambda name: f"{name}-20260102-030405-abcd")

    def run(*arguments, machine):
        made = []

        def spy(*inputs):
            made.append(make_plan(*inputs))
            return made[-1]

        monkeypatch.setattr(plans, "make_plan", spy)
        monkeypatch.setattr(topology, "detect", lambda: machine)
        assert cli.main([*arguments, "--dry-run"]) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]
        (plan,) = made
        return plan, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("name", "arguments", "machine"),
    [
        ("quickstart", ["quickstart"], LAPTOP),
        ("debug", ["quickstart", "--debug", "optim.lr=0.1"], LAPTOP),
        ("resnet50_8_gpus", ["resnet50_ft", "data.path=photos", "--gpus", "8"], SERVER),
        (
            "resnet50_two_nodes",
            [
                *("resnet50_ft", "data.path=photos", "--gpus", "8", "--nodes", "2", "--node-rank", "1"),
                *("--rdzv-endpoint", "server0:29400", "--run-dir", "/shared/runs/a"),
            ],
            dataclasses.replace(SERVER, omp_num_threads=4),
        ),
        ("slurm_two_nodes", ["resnet50_ft", "data.path=photos", *TWO_NODES, "--profile", "template"], LOGIN),
        ("slurm_pyxis", ["resnet50_ft", "data.path=photos", *TWO_NODES, "--profile", "pyxis"], LAPTOP),
        ("slurm_apptainer", ["resnet50_ft", "data.path=photos", *TWO_NODES, "--profile", "apptainer"], LOGIN),
        (
            "slurm_allocation",
            ["resnet50_ft", "data.path=photos", *TWO_NODES, "--profile", "apptainer"],
            dataclasses.replace(LOGIN, allocation="7"),
        ),
        (
            "slurm_cpu",
            ["quickstart", "--nodes", "2", "--procs", "2", "--profile", "dev", "post.profile=template", "name=mine"],
            LOGIN,
        ),
        (
            "slurm_elastic",
            [
                *("resnet50_ft", "data.path=photos", "--nodes", "2:4", "--spares", "1", "--gpus", "8"),
                *("--profile", "apptainer"),
            ],
            LOGIN,
        ),
        (
            "slurm_elastic_allocation",
            ["quickstart", "--nodes", "2:3", "--procs", "2", "--profile", "dev"],
            dataclasses.replace(LOGIN, allocation="7"),
        ),
    ],
)
def test_a_dry_run_prints_exactly_the_plan_and_it_is_golden(name, arguments, machine, dry_run):
    plan, printed = dry_run(*arguments, machine=machine)
    assert printed == f"{plan}\n"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(printed, encoding="utf-8")
    assert printed == golden.read_text(encoding="utf-8"), (
        "if this is meant: UPDATE_GOLDEN=1 pytest tests/plan/test_plan.py"
    )


def test_every_golden_plan_belongs_to_a_test():
    names = {"quickstart", "debug", "resnet50_8_gpus", "resnet50_two_nodes"}
    names |= {"slurm_two_nodes", "slurm_pyxis", "slurm_apptainer", "slurm_cpu", "slurm_allocation"}
    names |= {"slurm_elastic", "slurm_elastic_allocation"}
    assert {path.stem for path in GOLDEN.glob("*.txt")} == names


@pytest.mark.parametrize(
    ("launch", "machine", "request_", "backend"),
    [
        ({"nodes": 2, "gpus": 8}, "login", {}, "slurm"),
        ({"gpus": 8}, "login", {}, "slurm"),
        ({"procs": 2, "profile": "dev"}, "login", {}, "slurm"),
        ({"procs": 2}, "login", {}, "torchrun"),
        ({"procs": 2, "profile": "dev"}, "laptop", {}, "torchrun"),  # the same recipe runs on a laptop
        ({"nodes": 2, "procs": 2, "profile": "dev"}, "laptop", {}, "slurm"),  # to look at the script
        ({"nodes": 2, "procs": 2}, "login", {"rdzv_endpoint": "n0:1", "run_dir": "/r"}, "torchrun"),
        ({"procs": 2, "backend": "slurm"}, "laptop", {}, "slurm"),
        ({"procs": 2, "backend": "torchrun", "profile": "dev"}, "login", {}, "torchrun"),
    ],
)
def test_auto_is_slurm_where_it_is_there_and_wanted(launch, machine, request_, backend):
    plan = plan_of(launch, {"login": LOGIN, "laptop": LAPTOP}[machine], **request_)
    assert plan.backend == backend
    assert bool(plan.script) == (backend == "slurm")


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        ({"nodes": 4}, (4, 0, 0, False)),
        ({"nodes": "2:4"}, (4, 2, 0, True)),
        ({"nodes": "4:4"}, (4, 0, 0, False)),
        ({"nodes": "1:2", "spares": 1}, (2, 1, 1, True)),
        ({"nodes": 2, "spares": 3}, (2, 0, 3, True)),
    ],
)
def test_a_range_of_nodes_reaches_the_plan_and_the_job_has_all_machines(launch, expected):
    plan = plan_of({**launch, "procs": 2}, LOGIN)
    assert (plan.nodes, plan.min_nodes, plan.spares, plan.is_elastic) == expected
    assert plan.world_size == 2 * plan.nodes
    assert f"#SBATCH --nodes={plan.nodes + plan.spares}\n" in plan.script
    assert ("\n#SBATCH --no-kill\n" in plan.script) == plan.is_elastic
    assert ("--kill-on-bad-exit" in plan.script) != plan.is_elastic
    assert LaunchPlan.from_dict(plan.to_dict()).is_elastic == plan.is_elastic


def test_the_global_batch_of_a_run_that_shrinks_is_that_of_all_nodes_and_is_said():
    launch = {"nodes": "2:3", "procs": 2}
    for batch, said in (({"size": 8, "accumulate": 2}, "96 images"), ({"global_size": 50}, "50 images"), ({}, "meas")):
        recipe = recipes.from_dict({"data": {"name": "digits"}, "launch": launch, "batch": batch})
        (row,) = [
            line for line in str(make_plan(recipe, LOGIN, Request(run_id="r"))).splitlines() if "elastic " in line
        ]
        assert "goes on with 2 or more nodes; a step is always that of 3: " in row
        assert said in row


def test_a_spare_node_started_by_hand_has_a_number_beyond_the_others():
    by_hand = {"rdzv_endpoint": "n0:1", "run_dir": "/r"}
    assert plan_of({"nodes": "1:2", "spares": 1}, node_rank=2, **by_hand).node_rank == 2
    with pytest.raises(UsageError, match=r"--node-rank 3: nodes are counted from 0, so at most 2"):
        plan_of({"nodes": "1:2", "spares": 1}, node_rank=3, **by_hand)


def test_a_job_must_say_what_it_needs():
    with pytest.raises(UsageError, match=r"a SLURM job must say what it needs: --gpus M .* or --procs P"):
        plan_of({"nodes": 2}, LOGIN)
    with pytest.raises(UsageError, match="--node-rank and --rdzv-endpoint are for nodes without SLURM"):
        plan_of({"backend": "slurm", "procs": 1}, LOGIN, node_rank=1)


def test_a_jobs_run_directory_is_absolute_whatever_the_nodes_working_directory():
    plan = plan_of({"nodes": 2, "gpus": 8}, LOGIN)
    assert plan.run_dir == "/home/me/runs/r-1"
    assert plan_of({"nodes": 2, "gpus": 8}, LOGIN, run_dir="/shared/r").run_dir == "/shared/r"
    assert (plan.device, plan.procs_per_node, plan.threads_per_proc) == ("cuda", 8, 8)


def test_a_jobs_run_directory_has_no_percent_sign_which_slurm_would_replace():
    with pytest.raises(UsageError, match=r"--run-dir /shared/run 1%j: SLURM puts something else"):
        plan_of({"nodes": 2, "gpus": 8}, LOGIN, run_dir="/shared/run 1%j")
    for path in ("/shared/a\\b", "/shared/a\nb"):
        with pytest.raises(UsageError, match="SLURM puts something else in the place of a %, a backslash or a control"):
            plan_of({"nodes": 2, "gpus": 8}, LOGIN, run_dir=path)
    assert plan_of({"nodes": 2, "gpus": 8}, LOGIN, run_dir="/my runs/1").run_dir == "/my runs/1"
    assert plan_of({}, run_dir="1%j").run_dir == "1%j"


def test_planning_a_thousand_nodes_takes_no_longer_than_planning_one():
    """Nothing in a plan is made for each node; the time itself is measured by `make bench`."""
    one, many = (plan_of({"nodes": nodes, "gpus": 8}, LOGIN) for nodes in (1, 1024))
    assert many.world_size == 8192
    assert abs(len(str(many)) - len(str(one))) < 100


def test_a_plan_reads_no_file_and_starts_nothing_and_is_the_same_each_time():
    """In a process of its own: an audit hook cannot be taken off again."""
    code = """
import copy, sys
from launcher.plan.plan import make_plan
from launcher.plan.request import Request
from launcher.plan.topology import Topology
from launcher.recipe import load as recipes

recipe = recipes.from_dict({"model": {"weights": "/w.pth", "freeze": ["a"]}, "data": {"path": "/photos"}})
inputs = recipe, Topology(num_cores=8, num_gpus=2, host="h"), Request(run_id="r-1", run_dir="/runs/r")
before = copy.deepcopy(inputs)
first = make_plan(*inputs), str(make_plan(*inputs))  # imports what it needs
touched = []
sys.addaudithook(lambda event, _: touched.append(event))
second = make_plan(*inputs), str(make_plan(*inputs))
events = {event for event in touched if event.split(".")[0] in ("open", "os", "subprocess", "socket", "shutil", "glob")}
assert events == set(), events
assert first == second
assert inputs == before
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_plan_is_frozen_and_its_facts_are_json():
    plan = plan_of({"procs": 2}, run_dir="/runs/a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.nodes = 3
    facts = plan.to_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert "recipe" not in facts  # it lies beside it
    contract = {"run_id", "name", "command", "backend", "device", "nodes", "procs_per_node", "world_size"}
    assert contract <= set(facts)
    assert facts["world_size"] == 2


# --- what holds for every plan

COUNTS = st.integers(1, 4) | st.just("auto")
LAUNCHES = st.fixed_dictionaries(
    {
        "nodes": st.just(1) | st.integers(1, 4),
        "gpus": COUNTS,
        "procs": COUNTS,
        "device": st.sampled_from(["auto", "cuda", "cpu"]),
        "backend": st.sampled_from(["auto", "local", "torchrun"]),
        "max_restarts": st.integers(0, 3),
    },
)
MACHINES = st.builds(
    Topology,
    num_cores=st.integers(1, 128),
    num_gpus=st.integers(0, 5),
    host=st.just("h"),
    omp_num_threads=st.none() | st.integers(1, 16),
)


@settings(max_examples=1000)
@given(launch=LAUNCHES, machine=MACHINES, node_rank=st.integers(0, 3))
def test_what_is_planned_is_what_was_asked_for_and_what_there_is(launch, machine, node_rank):
    recipe = recipe_schema.Recipe(launch=recipe_schema.LaunchConfig(**launch))
    assume(not list(recipe_checks._placement(recipe)))
    many = {"node_rank": node_rank, "rdzv_endpoint": "n0:29400", "run_dir": "/shared"}
    try:
        plan = make_plan(recipe, machine, Request(run_id="r-1", **(many if launch["nodes"] > 1 else {})))
    except UsageError:
        assert launch["device"] != "cpu" or node_rank >= launch["nodes"]  # a CPU refuses no number
        return
    assert plan.nodes == launch["nodes"]
    assert plan.world_size == plan.nodes * plan.procs_per_node
    assert 0 <= plan.node_rank < plan.nodes
    assert launch["procs"] in ("auto", plan.procs_per_node)
    assert launch["gpus"] == "auto" or (plan.device, plan.procs_per_node) == ("cuda", launch["gpus"])
    if plan.device == "cuda":
        assert plan.procs_per_node <= machine.num_gpus
    else:
        assert launch["device"] == "cpu" or machine.num_gpus == 0
        assert plan.env["CUDA_VISIBLE_DEVICES"] == ""
    assert plan.threads_per_proc >= 1
    if machine.omp_num_threads:
        assert plan.threads_per_proc == machine.omp_num_threads
    else:
        assert plan.threads_per_proc * plan.procs_per_node <= max(machine.num_cores, plan.procs_per_node)
    assert plan.env["OMP_NUM_THREADS"] == str(plan.threads_per_proc)


def test_the_exports_have_all_cores_unless_somebody_says_otherwise():
    def export_threads(said=None, **launch):
        recipe = recipes.from_dict({"data": {"name": "digits"}, "launch": {"device": "cpu", "procs": 2, **launch}})
        machine = dataclasses.replace(LOGIN, omp_num_threads=said)
        return make_plan(recipe, machine, Request(run_id="r-1")).export_threads

    assert export_threads() is None
    assert export_threads(said=3) == 3
    assert export_threads(said=3, threads=2) == 2


@pytest.mark.parametrize(
    ("launch", "env", "shell", "threads"),
    [
        ({}, {}, None, 3),
        ({}, {}, 5, 5),
        ({}, {"OMP_NUM_THREADS": "7"}, 5, 7),
        ({"threads": 2}, {"OMP_NUM_THREADS": "7"}, 5, 2),
    ],
)
def test_the_workers_of_a_job_have_the_threads_that_the_nearest_word_says(launch, env, shell, threads):
    job = {"backend": "slurm", "nodes": 2, "procs": 2, **launch}
    recipe = recipes.from_dict({"data": {"name": "digits"}, "launch": job})
    machine = dataclasses.replace(LOGIN, omp_num_threads=shell)
    plan = make_plan(recipe, machine, Request(run_id="r-1"), Profile(cpus_per_gpu=3, env=env))
    assert plan.threads_per_proc == threads
    assert plan.export_threads == (threads if launch or env or shell else None)
    assert plan.env["OMP_NUM_THREADS"] == str(threads)


# --- GPUs


@pytest.mark.parametrize(
    ("launch", "num_gpus", "message"),
    [
        ({"gpus": 8}, 0, "8 GPUs per node asked for, but h has none; use --procs N for N workers on the CPU"),
        ({"gpus": 8}, 2, "8 GPUs per node asked for, but h has only 2; use --gpus 2, or use --procs N"),
        ({"gpus": 1}, 0, "1 GPU per node asked for, but h has none"),
        ({"device": "cuda"}, 0, "1 GPU per node asked for, but h has none"),
        ({"device": "cuda", "procs": 3}, 2, "3 workers per node asked for, but h has 2 GPUs and each worker takes one"),
        (
            {"procs": 3},
            2,
            "3 workers per node asked for, but h has 2 GPUs and each worker takes one; launch.device=cpu",
        ),
    ],
)
def test_gpus_that_are_not_there_are_an_error_with_the_remedy(launch, num_gpus, message):
    with pytest.raises(UsageError) as caught:
        plan_of(launch, Topology(num_cores=8, num_gpus=num_gpus, host="h"))
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("launch", "num_gpus", "device", "procs"),
    [
        ({}, 0, "cpu", 1),
        ({}, 3, "cuda", 3),
        ({"gpus": 2}, 3, "cuda", 2),
        ({"procs": 2}, 3, "cuda", 2),
        ({"procs": 2}, 0, "cpu", 2),
        ({"device": "cpu"}, 3, "cpu", 1),
        ({"device": "cpu", "procs": 5}, 3, "cpu", 5),
        ({"device": "cuda"}, 3, "cuda", 3),
        ({"backend": "local"}, 3, "cuda", 1),
        ({"backend": "local"}, 0, "cpu", 1),
    ],
)
def test_auto_takes_what_there_is(launch, num_gpus, device, procs):
    plan = plan_of(launch, Topology(num_cores=8, num_gpus=num_gpus, host="h"))
    assert (plan.device, plan.procs_per_node) == (device, procs)


# --- several nodes


@pytest.mark.parametrize(
    "endpoint",
    [
        None,
        "",
        "n0",
        "n0:",
        ":29400",
        "n0:port",
        "n0:0",
        "n0:65536",
        "n0:-1",
        "[::1]",
        "::1:29400",
        "tcp://n0:1",
        "n0:²",
        "n0: 1",
    ],
)
def test_several_nodes_need_a_place_to_meet(endpoint):
    with pytest.raises(
        UsageError, match=r"2 nodes without SLURM: .*--node-rank K and --rdzv-endpoint HOST:PORT"
    ) as error:
        plan_of({"nodes": 2}, rdzv_endpoint=endpoint, run_dir="/shared")
    assert not endpoint or f"found --rdzv-endpoint {endpoint};" in str(error.value)


def test_several_nodes_need_a_run_directory_that_they_share():
    with pytest.raises(UsageError, match=r"give all of them the same --run-dir"):
        plan_of({"nodes": 2}, rdzv_endpoint="n0:29400")


@pytest.mark.parametrize("node_rank", [2, 7, -1])
def test_a_node_is_one_of_those_there_are(node_rank):
    with pytest.raises(UsageError, match=rf"--node-rank {node_rank}: nodes are counted from 0"):
        plan_of({"nodes": 2}, rdzv_endpoint="n0:29400", run_dir="/shared", node_rank=node_rank)


@pytest.mark.parametrize("request_", [{"node_rank": 1}, {"rdzv_endpoint": "n0:29400"}, {"node_rank": -1}])
def test_flags_for_several_nodes_are_refused_on_one(request_):
    with pytest.raises(UsageError, match="for more than one node; add --nodes N"):
        plan_of({}, **request_)


@pytest.mark.parametrize("endpoint", ["n0:29400", "10.0.0.1:1", "[::1]:65535"])
def test_the_place_to_meet_is_kept(endpoint):
    plan = plan_of({"nodes": 3}, rdzv_endpoint=endpoint, run_dir="/shared", node_rank=2)
    assert (plan.rdzv_endpoint, plan.node_rank, plan.world_size) == (endpoint, 2, 3)
    assert "GLOO_SOCKET_IFNAME" not in plan.env  # loopback reaches nobody


def test_sbatchs_own_variables_fill_what_a_profile_leaves_open():
    said = {"SBATCH_ACCOUNT": "proj", "SBATCH_PARTITION": "fast", "SBATCH_TIMELIMIT": "5"}
    login = dataclasses.replace(LOGIN, sbatch_variables=said)
    recipe = recipes.from_dict({"data": {"name": "digits"}, "launch": {"nodes": 2, "gpus": 8}})
    script = make_plan(recipe, login, Request(run_id="r-1"), Profile(partition="gpu")).script
    assert "#SBATCH --account=proj" in script
    assert "#SBATCH --partition=gpu" in script
    assert "#SBATCH --time=240" in script


def test_a_step_of_a_step_shares_what_that_holds():
    shell = dataclasses.replace(LOGIN, allocation="7")
    for in_step in (False, True):
        command = plan_of({"nodes": 2, "gpus": 8}, dataclasses.replace(shell, in_step=in_step)).command
        assert ("--overlap" in command) == in_step
        assert "--export=ALL" in command


def test_one_node_stays_on_its_own_loopback_and_takes_any_port():
    plan = plan_of({})
    assert plan.rdzv_endpoint == "127.0.0.1:0"
    assert plan.env["GLOO_SOCKET_IFNAME"] == "lo"


def test_the_command_is_the_nodes_supervisor():
    plan = plan_of({"nodes": 2}, rdzv_endpoint="n0:1", run_dir="/my runs/a", node_rank=1)
    given = ("--nodes", "2", "--procs", "1", "--rdzv-endpoint", "n0:1")
    assert plan.command == ("python", "-m", "launcher.node", "/my runs/a", "--node-rank", "1", *given)
    assert (
        f"command      python -m launcher.node '/my runs/a' --node-rank 1 {' '.join(given)}" in str(plan).splitlines()
    )


def test_no_supervisor_is_announced_where_none_runs():
    """`--debug` trains in the process of `launch`: no agent, no restarts (backends/local.py)."""
    plan = plan_of({"backend": "local", "procs": 1, "max_restarts": 3}, debug=True)
    assert "launcher.node.supervisor" not in str(plan)
    assert "restarts     at most 3" not in str(plan)


def test_a_run_directory_is_named_after_the_run():
    assert plan_of({}).run_dir == "runs/r-1"
    assert plan_of({}, run_dir="elsewhere").run_dir == "elsewhere"


# --- the facts of this machine


GPUS = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-8932f937-d72c-4106-c12f-20bd9faed9f6)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-8932aaaa-0000-4106-c12f-20bd9faed9f6)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-1b000000-d72c-4106-c12f-20bd9faed9f6)
  MIG 1g.5gb      Device  0: (UUID: MIG-4b000000-0000-5106-c12f-20bd9faed9f6)
  MIG 1g.5gb      Device  1: (UUID: MIG-5c000000-0000-5106-c12f-20bd9faed9f6)
"""


@pytest.mark.parametrize(
    ("visible", "num"),
    [
        ("", 0),
        (",", 0),
        ("-1", 0),
        ("none", 0),
        ("NoDevFiles", 0),
        ("0", 1),
        ("0,1, 2", 3),
        ("2,0", 2),
        ("0,1,7", 2),  # up to the first that is none
        ("7,0,1", 0),
        ("0,-1,1", 1),
        ("0,foo,1", 1),
        ("0,,1", 1),
        ("0,1,", 2),
        ("0,1,0", 0),  # none at all where one comes twice
        ("GPU-8932f", 1),
        ("GPU-8932", 0),  # the beginning of two
        ("GPU-1b,GPU-8932a", 2),
        ("GPU-1b,GPU-dead,GPU-8932a", 1),
        ("MIG-4b", 1),
        ("2", 1),
        ("GPU-1b", 1),
        ("MIG-4b,MIG-5c", 1),  # a process sees one
        ("MIG-dead", 0),
    ],
)
def test_gpus_are_those_that_cuda_sees(visible, num, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done <<'END'\n{GPUS}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert topology.detect().num_gpus == num


@pytest.mark.parametrize("visible", ["GPU-8932f", "MIG-4b000000", "0"])
def test_where_nobody_tells_their_names_those_of_the_list_are_believed(visible, monkeypatch):
    """Without nvidia-smi, as in many containers."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(topology, "listed_gpus", lambda: (["", ""], []))
    assert topology.detect().num_gpus == 1


def test_a_list_of_gpus_makes_none_on_a_machine_without(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(topology, "listed_gpus", lambda: ([], []))
    assert topology.detect().num_gpus == 0


@pytest.mark.parametrize(
    ("script", "num"),
    [
        ("echo 'GPU 0: NVIDIA A100 (UUID: a)'; echo '  MIG 1g.5gb Device 0: (UUID: b)'; echo 'GPU 1: NVIDIA A100'", 2),
        ('for gpu in 0 1; do echo "GPU $gpu: A100 (UUID: $gpu)"; echo "  MIG 1g.5gb Device 0: (UUID: m$gpu)"; done', 1),
        ("echo 'No devices were found'", 0),
    ],
)
def test_else_gpus_are_those_that_the_driver_lists(script, num, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert topology.detect().num_gpus == num


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("", None), ("two", None), ("4,2", 4)])
def test_threads_are_what_the_environment_says(value, threads, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert topology.detect().omp_num_threads == threads


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7})
    assert topology.detect().num_cores == 3
