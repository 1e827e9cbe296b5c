from __future__ import annotations

import os

import pytest

from launcher.backends.slurm import task
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
    plan = {"env": {"OMP_NUM_THREADS": "8"}, "profile": {"interface": None}}
    assert task._own_address(plan, toward="n2") == "10.0.0.1"
    network.set_environment(plan["env"])
    assert (expected | {"OMP_NUM_THREADS": "8"}).items() <= os.environ.items()
