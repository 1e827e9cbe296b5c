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
        ({}, {"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}),
        ({"NCCL_SOCKET_IFNAME": "ib"}, {"NCCL_SOCKET_IFNAME": "ib", "GLOO_SOCKET_IFNAME": "eth0"}),
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
    assert (expected | {"OMP_NUM_THREADS": "8"}).items() <= os.environ.items()


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
