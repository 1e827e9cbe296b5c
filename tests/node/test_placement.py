"""Where workers are put, on machines that a test makes up: two sockets, GPUs on both."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from launcher.engine import data, worker
from launcher.engine.distributed import Ranks
from launcher.node import placement
from launcher.plan.launch_plan import LaunchPlan
from launcher.runs.heartbeats import Heartbeats
from launcher.runs.run_dir import ATTEMPT_VARIABLE
from launcher.system import numa
from launcher.system.files import write_json_atomic

SOCKETS = {0: "0-15,32-47", 1: "16-31,48-63"}
GPUS = {"1a": 0, "3b": 0, "8a": 1, "b3": 1}
"""Their buses, and the socket that each hangs on."""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine; returns its root. Without NVIDIA's own tool, as a fallback is tested more rarely than it runs."""

    def make(*, nodes=SOCKETS, gpus=GPUS, cores=range(64), tool=True, models=None):
        root = tmp_path / "root"
        for number, listed in nodes.items():
            folder = root / f"sys/devices/system/node/node{number}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(f"{listed}\n")
        rows = []
        for index, (bus, node) in enumerate(gpus.items()):
            device = root / f"sys/bus/pci/devices/0000:{bus}:00.0"
            device.mkdir(parents=True)
            (device / "numa_node").write_text(f"{node}\n")
            (device / "local_cpulist").write_text(f"{nodes.get(node, '0-63')}\n")
            model = (models or {}).get(bus, "NVIDIA A100")
            rows.append(f"GPU-{bus}, 00000000:{bus.upper()}:00.0, {model}")
            information = root / f"proc/driver/nvidia/gpus/0000:{bus}:00.0/information"
            information.parent.mkdir(parents=True)
            information.write_text(f"Model: \t\t {model}\nIRQ: \t\t {index}\nGPU UUID: \t GPU-{bus}\n")
        folder = tmp_path / "bin"
        folder.mkdir()
        if tool:
            listed = "\\n".join(
                [f"GPU {i}: A100 (UUID: GPU-{bus})" for i, bus in enumerate(gpus)] + ["  MIG 1g: (UUID: MIG-9)"]
            )
            lines = "\\n".join(rows)
            (folder / "nvidia-smi").write_text(
                f"#!/bin/sh\n[ $1 = -L ] && printf '{listed}\\n' || printf '{lines}\\n'\n"
            )
            (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", *placement.THREADS_ARE_BOUND):
            monkeypatch.delenv(name, raising=False)
        return root

    return make


def plan(device, procs, **changes):
    return LaunchPlan(run_id="a", device=device, procs_per_node=procs, threads_per_proc=16, **changes)


def shown(root, device, procs):
    """Node, cores and share of each worker."""
    return [
        (one.node, numa.show_cores(one.cores), one.num_cores) for one in placement.places(plan(device, procs), root)
    ]


FIRST, SECOND = (0, "0-15,32-47", 16), (1, "16-31,48-63", 16)


@pytest.mark.parametrize("tool", [True, False])
def test_each_worker_is_put_on_the_socket_of_its_gpu(machine, tool):
    assert shown(machine(tool=tool), "cuda", 4) == [FIRST, FIRST, SECOND, SECOND]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("2,0", [1, 0]),
        ("GPU-8a,GPU-1a", [1, 0]),
        ("3", [1]),
        ("MIG-9", [1]),  # a slice of the last
    ],
)
def test_gpus_are_those_that_cuda_sees_in_its_order(machine, monkeypatch, visible, expected):
    root = machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [node for node, *_ in shown(root, "cuda", len(expected))] == expected


def test_within_the_cores_that_the_job_was_given(machine):
    assert shown(machine(cores=[*range(4), *range(16, 20)]), "cuda", 4) == [
        (0, "0-3", 2),
        (0, "0-3", 2),
        (1, "16-19", 2),
        (1, "16-19", 2),
    ]


@pytest.mark.parametrize(
    ("made", "procs"),
    [
        ({"nodes": {0: "0-63"}, "gpus": dict.fromkeys(GPUS, 0)}, 4),  # one node
        ({"gpus": dict.fromkeys(GPUS, -1)}, 4),  # the firmware does not say
        ({"cores": range(8)}, 2),  # bound to one socket already, as by srun --cpu-bind
        ({"cores": [*range(15), 16]}, 4),  # near its GPU a worker would have next to nothing
        ({"gpus": {"1a": 0}}, 2),  # fewer are known than there are workers
        ({"models": {"1a": "NVIDIA T4"}}, 4),  # which of them is CUDA's first?
    ],
)
def test_where_it_is_not_known_or_would_harm_nothing_changes(machine, made, procs):
    root = machine(**made)
    assert placement.places(plan("cuda", procs), root) == []


def test_unlike_gpus_are_placed_where_their_order_is_known(machine, monkeypatch):
    root = machine(models={"1a": "NVIDIA T4"})
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert shown(root, "cuda", 4) == [FIRST, FIRST, SECOND, SECOND]


def test_whoever_binds_threads_by_openmp_is_left_alone(machine, monkeypatch):
    root = machine()
    monkeypatch.setenv("OMP_PLACES", "cores")
    assert placement.places(plan("cuda", 4), root) == []


QUARTERS = {0: "0-15", 1: "16-31", 2: "32-47", 3: "48-63"}


@pytest.mark.parametrize(
    ("made", "procs", "expected"),
    [
        ({}, 2, [(0, "0-15,32-47", 32), (1, "16-31,48-63", 32)]),
        ({}, 4, [FIRST, FIRST, SECOND, SECOND]),
        ({"nodes": QUARTERS}, 2, [(None, "0-31", 32), (None, "32-63", 32)]),
        ({"nodes": QUARTERS}, 4, [(0, "0-15", 16), (1, "16-31", 16), (2, "32-47", 16), (3, "48-63", 16)]),
        ({}, 1, []),
        ({}, 3, []),  # one would have more cores than the others, which it waits for
        ({"cores": range(40)}, 2, []),
        ({"nodes": {0: "0-63"}}, 4, []),
    ],
)
def test_workers_on_the_cpu_are_spread_over_the_nodes_where_that_comes_out_even(machine, made, procs, expected):
    assert shown(machine(**made), "cpu", procs) == expected


@pytest.mark.parametrize(("said", "threads"), [(None, 10), (16, 16)])
def test_a_worker_computes_with_its_share_unless_the_user_has_said_otherwise(machine, said, threads):
    """Three GPUs hang on one socket."""
    root = machine(gpus={"1a": 0, "3b": 0, "5c": 0, "8a": 1})
    found = placement.places(plan("cuda", 4, export_threads=said), root)
    assert [place.num_cores for place in found] == [10, 10, 10, 32]
    assert [place.threads for place in found] == [threads, threads, threads, 16]


def test_a_quota_of_the_job_is_shared_out_too(machine):
    root = machine()
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text("0::/job\n")
    (root / "sys/fs/cgroup/job").mkdir(parents=True)
    (root / "sys/fs/cgroup/job/cpu.max").write_text("3200000 100000\n")
    assert [share for *_, share in shown(root, "cuda", 4)] == [8] * 4


def test_a_worker_takes_its_place_before_it_counts_anything(tmp_path, monkeypatch):
    """What comes first in training is counted here: threads, cores for loaders."""
    core = max(os.sched_getaffinity(0))
    place = numa.Place(cores=frozenset({core}), node=0, num_cores=1, threads=3)
    monkeypatch.setenv(numa.PLACES_VARIABLE, str(place))
    monkeypatch.setenv(ATTEMPT_VARIABLE, "1")
    fork = multiprocessing.get_context("fork")
    told, run = fork.SimpleQueue(), worker.RunDir(tmp_path / "run")
    run.create()
    write_json_atomic(run.plan, {"run_id": "r", "device": "cpu"})

    def count(*_, **__):
        counted = data.num_rank_cores(Ranks(local_world_size=4))
        told.put((os.sched_getaffinity(0), counted, os.environ["OMP_NUM_THREADS"]))
        raise ValueError("counted")

    monkeypatch.setattr(worker, "training", count)
    process = fork.Process(target=worker.worker_main, args=(str(run.path), Heartbeats(1)))
    process.start()
    process.join(150)
    assert told.get() == ({core}, 1, "3")
    assert f"on cores {core}, near to NUMA node 0; its share is 1 of them" in run.rank_log(1, 0).read_text()
