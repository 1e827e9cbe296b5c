"""Nodes that are started by hand: on machines of their own (network namespaces), named as Debian names them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.node import meeting
from launcher.plan.launch_plan import Launched, LaunchPlan
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.system import network
from tests import ports, warm
from tests.nets import FACTORY

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes/debug.yaml")
SMALL = (
    "post.enabled=false",
    FACTORY,
    "train.epochs=1",
    "batch.size=9",
    "data.name=imagefolder",
    "--procs",
    "1",
    "--nodes",
    "2",
)
DEADLINE_S = 300
ADDRESSES = ("198.19.250.1", "198.19.250.2")
IPV6 = ("fd7a:1::1", "fd7a:1::2")
FAST, FAST_ADDRESSES = ("ib0", "ibp65s0"), ("198.19.251.1", "198.19.251.2")
"""A second network between the two, to which each has an interface of another name."""


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Run a command on one of two machines, `node0` and `node1`, joined by a cable."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"ftl-by-hand-{os.getpid()}-{rank}" for rank in range(2)]
    hosts = tmp_path_factory.mktemp("hosts")
    try:
        try:
            ip("netns", "add", names[0])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        ip("netns", "add", names[1])
        ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        ip("-n", names[0], "link", "add", FAST[0], "type", "veth", "peer", "name", FAST[1], "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "address", "add", f"{FAST_ADDRESSES[rank]}/24", "dev", FAST[rank])
            ip("-n", name, "address", "add", f"{ADDRESSES[rank]}/24", "dev", "eth0")
            ip("-n", name, "address", "add", f"{IPV6[rank]}/64", "dev", "eth0", "nodad")
            for link in ("lo", "eth0", FAST[rank]):
                ip("-n", name, "link", "set", link, "up")
            other = 1 - rank
            lines = ["127.0.0.1 localhost", f"127.0.1.1 node{rank}", "::1 localhost ip6-localhost"]
            lines += [f"{ADDRESSES[other]} node{other}", f"{ADDRESSES[0]} front"]
            (hosts / str(rank)).write_text("\n".join(lines) + "\n")

        def command(rank, *what):
            inside = f'hostname node{rank}; mount --bind {hosts / str(rank)} /etc/hosts; exec "$@"'
            enter = ("nsenter", f"--net=/run/netns/{names[rank]}", "unshare", "--uts", "--mount")
            return [*enter, "sh", "-c", inside, "sh", *what]

        yield command
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def start(machines, tmp_path, images):
    """Start `launch` on one of the machines."""
    started = []

    def start(rank, *arguments, **variables):
        environment = {name: value for name, value in os.environ.items() if name not in network.INTERFACES}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
        what = (RECIPE, *SMALL, f"data.path={images}", "--node-rank", str(rank), "--run-dir", "run", *arguments)
        started.append(
            subprocess.Popen(
                machines(rank, sys.executable, "-m", "launcher", *what),
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(*processes):
    outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("endpoints", "own"),
    [
        (("node0:29400", "node0:29400"), {}),  # as README has it
        ((f"{ADDRESSES[0]}:29400", "front:29400"), {"GLOO_SOCKET_IFNAME": "eth0"}),
        ((f"[{IPV6[0]}]:29400", f"[{IPV6[0]}]:29400"), {}),
    ],
    ids=["by name", "by address, with an interface", "IPv6"],
)
def test_two_machines_named_as_debian_does_train_together(endpoints, own, start, tmp_path):
    nodes = [start(rank, "--rdzv-endpoint", endpoints[rank], **own) for rank in (1, 0)]
    codes, outputs = finish(*nodes)
    assert codes == [0, 0], outputs
    run = RunDir(tmp_path / "run")
    assert {event["host"] for event in events(run, "attempt_started")} == {"node0", "node1"}
    assert json.loads((run.last_checkpoint / "state.json").read_text())["world_size"] == 2


WORKERS = """
import json, os, sys
from dataclasses import replace
from types import SimpleNamespace
from launcher.node import agent, meeting
from launcher.node.part import Part
from launcher.runs.heartbeats import Heartbeats
from launcher.runs.run_dir import RunDir
from launcher.system import network

def told():
    return {name: os.environ.get(name) for name in ("MASTER_ADDR", *network.INTERFACES)}

run = RunDir("run")
plan = replace(run.read_plan(), node_rank=int(sys.argv[1]), rdzv_endpoint=sys.argv[2])
plan = meeting.meet(run, plan, heed_stop=lambda: None)
network.set_environment(plan.env)
stop, beats = SimpleNamespace(requested=False), Heartbeats(1)
logs = agent._attempt_logs(run, Part(), node_rank=plan.node_rank, first_attempt=1, stop=stop, beats=beats)
from torch.distributed.launcher.api import elastic_launch
(found,) = elastic_launch(agent._config(plan, logs), told)().values()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("endpoint", "subnet", "names", "family"),
    [
        (f"{FAST_ADDRESSES[0]}:29411", "198.19.251.", FAST, "AF_INET"),
        (f"[{IPV6[0]}]:29413", "fd7a:1::", ("eth0", "eth0"), "AF_INET6"),
    ],
    ids=["fast network", "IPv6"],
)
def test_workers_are_told_address_and_interface_of_the_route_each_by_its_nodes_own_name(
    endpoint, subnet, names, family, machines, tmp_path
):
    run = RunDir(tmp_path / "run")
    run.create()
    run.write_plan(LaunchPlan(run_id="run", run_dir="run", device="cpu", nodes=2), Launched(created=1.0))
    environment = {name: value for name, value in os.environ.items() if name not in network.INTERFACES}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NCCL_IB_HCA": "mlx5_0"}
    nodes = [
        subprocess.Popen(
            machines(rank, sys.executable, "-c", WORKERS, str(rank), endpoint),
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (1, 0)
    ]
    codes, outputs = finish(*nodes)
    assert codes == [0, 0], outputs
    for output, name in zip(outputs, reversed(names), strict=True):
        told = json.loads(output.splitlines()[-1])
        assert told["MASTER_ADDR"].startswith(subnet)
        assert (told["NCCL_SOCKET_IFNAME"], told["GLOO_SOCKET_IFNAME"]) == (f"={name}", name)
        assert told["NCCL_SOCKET_FAMILY"] == family


@pytest.mark.slow
@pytest.mark.parametrize(
    ("endpoints", "said"),
    [
        (("localhost:29400", "node0:29400"), "node 0 (node0) was given --rdzv-endpoint localhost:29400, by which each"),
        (("node0:29400", "node1:29400"), "which is node1 itself, and node 0 runs on node0: give a name or address by"),
    ],
)
def test_what_keeps_them_apart_ends_both_with_the_same_words(endpoints, said, start, tmp_path):
    nodes = [start(rank, "--rdzv-endpoint", endpoints[rank]) for rank in (0, 1)]
    codes, outputs = finish(*nodes)
    assert codes == [2, 2], outputs
    assert all(said in output for output in outputs), outputs
    run = RunDir(tmp_path / "run")
    assert events(run, "attempt_started") == []
    assert run.read_status()["state"] == "failed"


@pytest.mark.slow
def test_other_numbers_of_workers_are_said_and_mended_the_run_is_resumed(start, tmp_path):
    nodes = [start(rank, "--rdzv-endpoint", "node0:29400", "--procs", str(1 + rank)) for rank in (0, 1)]
    codes, outputs = finish(*nodes)
    assert codes == [2, 2], outputs
    said = "--procs (or --gpus) is 2 on node 1 (node1) and 1 on node 0 (node0): give all nodes the same"
    assert all(said in output for output in outputs)
    # The other one first: what lies there from the last time is not taken for node 0's word.
    nodes = [start(rank, "--rdzv-endpoint", "node0:29400", "--resume") for rank in (1, 0)]
    codes, outputs = finish(*nodes)
    assert codes == [0, 0], outputs


@pytest.mark.parametrize(
    ("rank", "endpoint", "said"),
    [
        (0, "nowhere.invalid:29400", "this machine finds no address of nowhere.invalid"),
        (1, "nowhere.invalid:29400", "this machine finds no address of nowhere.invalid"),
        (1, "192.0.2.1:29400", "there is no way from this machine to 192.0.2.1"),
        (0, "node1:29400", f"node1 is not this machine, which has --node-rank 0; .*{ADDRESSES[0]} \\(eth0\\)"),
        (0, "0.0.0.0:29400", f"stands for any address; give node 0's own .*{ADDRESSES[0]} \\(eth0\\)"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused_before_anything_is_written(rank, endpoint, said, machines, tmp_path):
    code = "import sys; from launcher.node import meeting; meeting.check(sys.argv[1], node_rank=int(sys.argv[2]))"
    done = subprocess.run(
        machines(rank, sys.executable, "-c", code, endpoint, str(rank)),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UsageError" in done.stderr
    assert re.search(said, done.stderr), done.stderr


def test_a_port_that_is_taken_is_refused_with_a_free_one():
    port = ports.free()
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(UsageError, match=f"port {port} cannot be had .* such as [0-9]+, which is free here"),
    ):
        meeting.check(f"127.0.0.1:{port}", node_rank=0)
    meeting.check(f"127.0.0.1:{port}", node_rank=0)


def test_an_interface_is_found_by_either_kind_of_address():
    assert network.interface_of("127.0.0.1") == network.interface_of("::1") == "lo"
    assert network.split("[::1]:29400") == ("::1", 29400)
    assert network.join("::1", 29400) == "[::1]:29400"
    assert network.is_loopback("127.0.1.1")
    assert not network.is_own("192.0.2.1")


NODE0 = {"rank": 0, "host": "a", "machine": "A", "rdzv_endpoint": "a:1", "port": 1, "names_itself": False}
NODE0 |= {"nodes": 2, "procs_per_node": 4}
NODE1 = NODE0 | {"rank": 1, "host": "b", "machine": "B"}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {}, []),
        ({"names_itself": True}, {"names_itself": True, "machine": "A"}, []),  # all on one machine, and all say so
        ({"names_itself": True, "rdzv_endpoint": "[::1]:1"}, {}, ["give a name or address of a that all nodes reach"]),
        (
            {},
            {"names_itself": True, "rdzv_endpoint": "127.0.0.1:1"},
            ["node 1 (b) was given --rdzv-endpoint 127.0.0.1:1"],
        ),
        (
            {},
            {"unknown": ["GLOO_SOCKET_IFNAME=eth9: no such interface"]},
            ["node 1 (b): GLOO_SOCKET_IFNAME=eth9: no such interface"],
        ),
        ({}, {"port": 2}, ["the port of --rdzv-endpoint is 2 on node 1 (b) and 1 on node 0 (a)"]),
        ({"recipe": None}, {"recipe": {"optim.lr": "0.1"}}, []),  # node 0 was started by its command, with no recipe
        ({"recipe": {"seed": "0"}}, {"recipe": {"seed": "1"}}, ["seed is 1 on node 1 (b) and 0 on node 0 (a)"]),
        ({}, {"nodes": 3, "procs_per_node": 8}, ["--nodes is 3 on node 1", "--procs (or --gpus) is 8 on node 1"]),
    ],
)
def test_everything_that_keeps_nodes_apart_is_said_at_once(first, second, said):
    found = meeting.find_problems([NODE0 | first, NODE1 | second])
    assert len(found) == len(said)
    assert all(text in problem for text, problem in zip(said, found, strict=True)), found


def test_a_node_says_which_interfaces_it_was_given_and_has_not(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    (said,) = meeting._describe(LaunchPlan(run_id="a", nodes=2, rdzv_endpoint="localhost:1"))["unknown"]
    assert said.startswith("GLOO_SOCKET_IFNAME=eth99: no such interface with an address; there are ")


@pytest.mark.parametrize(
    ("endpoint", "is_so"),
    [("localhost:1", True), ("127.0.0.1:1", True), ("[::1]:1", True), (f"{os.uname().nodename}:1", False)],
)
def test_its_own_name_is_no_loopback_of_node_0_whatever_it_stands_for(endpoint, is_so):
    plan = LaunchPlan(run_id="a", nodes=2, rdzv_endpoint=endpoint)
    assert meeting._describe(plan)["names_itself"] == is_so


@pytest.mark.slow
@pytest.mark.parametrize("detach", [(), ("--detach",)])
def test_what_node_1_was_given_otherwise_is_said_with_both_values_and_trains_nothing(detach, tmp_path):
    """Its overrides would be ignored: the run's recipe is node 0's."""
    endpoint = f"127.0.0.1:{ports.free()}"
    common = [RECIPE, "--run-dir", "run", "--rdzv-endpoint", endpoint]
    common += ["--nodes", "2", "--procs", "1", "--backend", "torchrun", "post.enabled=false"]
    own = (("--node-rank", "0"), ("--node-rank", "1", "optim.lr=0.5", "train.epochs=7", *detach))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    files = [(tmp_path / f"output-{rank}", tmp_path / f"errors-{rank}") for rank in (0, 1)]
    nodes = [
        warm.Started([*common, *more], cwd=tmp_path, env=environment, files=to)
        for more, to in zip(own, files, strict=True)
    ]
    codes = [node.wait(DEADLINE_S) for node in nodes]
    said = [errors.read_text() for _, errors in files]
    assert codes == [2, 0 if detach else 2], said
    if detach:
        log = tmp_path / "run/logs/launch-1.log"
        deadline = time.monotonic() + DEADLINE_S
        while "train.epochs" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        said[1] = log.read_text()
    for text in said:
        assert re.search(
            r"optim\.lr is 0\.5 on node 1 .* and [0-9.e-]+ on node 0 .*: give all nodes the same recipe", text
        )
        assert "train.epochs is 7 on node 1" in text
        assert "launch.nodes" not in text
    assert events(RunDir(tmp_path / "run"), "attempt_started") == []
