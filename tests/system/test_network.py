from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from launcher.backends.slurm import node_start
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.profile import Profile
from launcher.system import network


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_FAMILY": "AF_INET"}),
        (
            {"NCCL_SOCKET_IFNAME": "ib"},  # of whatever family
            {"NCCL_SOCKET_IFNAME": "ib", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_FAMILY": None},
        ),
        ({"NCCL_SOCKET_FAMILY": "AF_INET6"}, {"NCCL_SOCKET_IFNAME": "=eth0", "NCCL_SOCKET_FAMILY": "AF_INET6"}),
    ],
)
def test_an_interface_that_the_user_names_stays_and_else_the_nodes_own_is_told(own, expected, monkeypatch):
    for name in (*network.INTERFACES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():  # exported before `launch`, or by the profile's env
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(network, "local_address", lambda _: "10.0.0.1")
    monkeypatch.setattr(network, "interface_of", lambda _: "eth0")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    plan = LaunchPlan(run_id="a", env={"OMP_NUM_THREADS": "8"}, profile=Profile(interface=None))
    plan = node_start.with_address(plan, toward="n2")
    assert plan.address == "10.0.0.1"
    network.set_environment(plan.env)
    assert os.environ["OMP_NUM_THREADS"] == "8"
    assert {name: os.environ.get(name) for name in expected} == expected
    assert not any(name.startswith("NCCL_IB") for name in plan.env)  # NCCL goes on using InfiniBand where it has it


def test_nccl_is_told_the_family_of_the_route_and_an_aliass_own_interface():
    told = network.interface_environment("eth0:1", "fd00::1")
    assert told["NCCL_SOCKET_IFNAME"] == "=eth0"  # what follows a colon would be a port
    assert told["NCCL_SOCKET_FAMILY"] == "AF_INET6"
    assert told["GLOO_SOCKET_IFNAME"] == "eth0:1"


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "eth0,eth9", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "eth9,ib", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=ib0", True),
        ("NCCL_SOCKET_IFNAME", "eth0:1", True),
        ("NCCL_SOCKET_IFNAME", "en", False),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", False),
        ("NCCL_SOCKET_IFNAME", "^=lo", True),
        ("NCCL_SOCKET_IFNAME", "", True),
    ],
)
def test_an_interface_that_the_user_names_and_the_machine_has_not_is_told(name, value, known, monkeypatch):
    monkeypatch.setattr(network, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"})
    monkeypatch.setattr(network, "_addresses", lambda family: {})
    found = network.unknown_interfaces({name: value})
    assert found == ([] if known else [f"{name}={value}: no such interface with an address; there are eth0, ib0, lo"])


ALL_OF_ONE = """
import subprocess
from launcher.system import network
for line in ("link add d0 type veth peer name d1", "address add 10.9.0.1/24 dev d0", "address add 10.9.0.2/24 dev d0",
             "address add fd00:9::1/64 dev d0 nodad", "link set d0 up"):
    subprocess.run(["ip", *line.split()], check=True)
print([network.interface_of(one) for one in ("10.9.0.1", "10.9.0.2", "fd00:9::1", "10.9.0.3", "127.0.1.1")])
print(network.address_of("d0"), network.address_of("lo"))
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"), reason="needs root")
def test_an_interface_is_found_by_each_of_its_addresses():
    command = ["unshare", "--net", sys.executable, "-c", ALL_OF_ONE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "CalledProcessError" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.splitlines() == ["['d0', 'd0', 'd0', None, 'lo']", "10.9.0.1 None"], done.stderr
