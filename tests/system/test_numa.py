"""NUMA nodes by sysfs, and a process that keeps to its place."""

from __future__ import annotations

import multiprocessing
import os
import platform
from pathlib import Path

import pytest

from launcher.system import numa
from launcher.system.numa import Place


@pytest.mark.parametrize(
    ("text", "cores"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0-1,4-5", {0, 1, 4, 5})]
)
def test_lists_of_cores_are_read_and_written_as_the_kernel_does(text, cores):
    assert numa.parse_cores(text) == cores
    assert numa.show_cores(cores) == text.strip()


@pytest.mark.parametrize("node", [None, 0, 70])
def test_a_place_goes_through_the_environment(node, monkeypatch):
    place = Place(cores=frozenset({0, 1, 9}), node=node, num_cores=2, threads=3)
    other = Place(cores=frozenset({4}), node=1, num_cores=1, threads=1)
    monkeypatch.setenv(numa.PLACES_VARIABLE, f"{other};{place}")
    assert (Place.told(0), Place.told(1)) == (other, place)
    monkeypatch.setenv(numa.PLACES_VARIABLE, "")
    assert Place.told(0) is None


@pytest.mark.parametrize("address", ["00000000:3B:00.0", "0000:3b:00.0\n"])
@pytest.mark.parametrize(
    ("node", "local", "near"),
    [
        ("1", "4-7", (1, {4, 5, 6, 7})),
        ("1", None, (1, {6, 7})),  # an old kernel: by the node
        ("-1", "0-7", (None, set())),  # the firmware does not say
        (None, None, (None, set())),
    ],
)
def test_what_is_near_to_a_device(address, node, local, near, tmp_path):
    device, nodes = tmp_path / "sys/bus/pci/devices/0000:3b:00.0", tmp_path / "sys/devices/system/node"
    for name, cores in {"node0": "0-5", "node1": "6-7", "node2": ""}.items():
        (nodes / name).mkdir(parents=True)
        (nodes / name / "cpulist").write_text(f"{cores}\n")
    device.mkdir(parents=True)
    for name, text in {"numa_node": node, "local_cpulist": local}.items():
        if text is not None:
            (device / name).write_text(f"{text}\n")
    assert numa.near_device(address, tmp_path) == near
    assert numa.nodes(tmp_path) == {0: {0, 1, 2, 3, 4, 5}, 1: {6, 7}}  # memory alone is no place to compute


def _take(place, told):
    place.take()
    first = Path("/proc/self/numa_maps").read_text(encoding="ascii").splitlines()[0].split()[1]
    told.put((os.sched_getaffinity(0), first))


@pytest.mark.skipif(
    platform.machine() not in numa.SET_MEMPOLICY or not Path("/proc/self/numa_maps").exists(),
    reason="not to be seen here",
)
def test_a_process_keeps_to_cores_and_memory_of_its_place():
    core = min(os.sched_getaffinity(0))
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()
    for place in (
        Place(cores=frozenset({core}), node=0, num_cores=1, threads=1),
        Place(cores=frozenset({core}), node=None, num_cores=1, threads=1),
        Place(cores=frozenset({core}), node=200, num_cores=1, threads=1),  # not there: no error, and any memory
    ):
        process = fork.Process(target=_take, args=(place, told))
        process.start()
        process.join(150)
        cores, policy = told.get()
        assert cores == {core}
        assert policy.startswith("prefer:0" if place.node == 0 else "default")
