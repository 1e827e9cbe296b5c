"""Cores: the least of the affinity and of the time that control groups grant."""

from __future__ import annotations

import os

import pytest

from launcher.system import cores as host_cores


@pytest.fixture
def machine(tmp_path):
    """A /proc and a /sys of our own."""

    def make(own, files):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(own)
        for name, text in files.items():
            file = tmp_path / "sys/fs/cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/job", {"job/cpu.max": "250000 100000"}, 2.5),
        ("0::/job/step", {"job/cpu.max": "100000 50000", "job/step/cpu.max": "max 100000"}, 2),
        ("0::/job/step", {"job/cpu.max": "200000 100000", "job/step/cpu.max": "300000 100000"}, 2),
        ("0::/job/step", {"job/cpu.max": "300000 100000", "job/step/cpu.max": "200000 100000"}, 2),
        ("0::/not/shown/here", {"cpu.max": "150000 100000"}, 1.5),
        ("3:cpu,cpuacct:/job\n2:memory:/", {"cpu/job/cpu.cfs_quota_us": "50000", "memory/cpu.max": "1 1"}, 0.5),
        ("3:cpu:/job", {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "25000"}, 2),
        ("3:cpu:/job", {"cpu/job/cpu.cfs_quota_us": "-1"}, None),
        ("3:cpuset:/", {"cpu/cpu.cfs_quota_us": "50000"}, None),
    ],
)
def test_the_least_quota_of_the_control_groups_counts(own, files, quota, machine):
    assert host_cores.quota(machine(own, files)) == quota


@pytest.mark.parametrize(
    ("granted", "cores"), [("50000", 1), ("100000", 1), ("199000", 1), ("250000", 2), ("9900000", 4)]
)
def test_half_a_core_is_one_and_what_is_no_whole_core_is_none(granted, cores, machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert host_cores.num_cores(machine("0::/job", {"job/cpu.max": f"{granted} 100000"})) == cores


def test_without_control_groups_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7})
    assert host_cores.num_cores(tmp_path) == 3
