"""What a machine does at the moment, by files as Linux writes them and by what nvidia-smi prints.

The lines of nvidia-smi are in the form that its manual describes; no GPU was here.
"""

from __future__ import annotations

import os

import pytest

from launcher.system.load import Load, parse_gpus

MEMINFO = "MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:   12000000 kB\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    ticks(tmp_path, 100)
    return tmp_path


def ticks(root, busy):
    """Cores 0 to 2, of which the second is not ours and does nothing else."""
    ours = f"{busy} 0 10 50 0 5 0 0 0 0"
    (root / "proc/stat").write_text(f"cpu  9 9 9 9 9 9\ncpu0 {ours}\ncpu1 999999 0 0 0 0 0 0 0\ncpu2 {ours}\nintr 1\n")


def test_cores_and_memory(root):
    load = Load(gpus=False, root=root, environment={})
    (root / "proc/stat").write_text(
        "cpu0 130 0 10 60 0 5 0 0 0 0\ncpu1 1 0 0 0 0 0 0 0\ncpu2 100 0 10 90 0 5 0 0 0 0\n"
    )
    assert load.measure() == {"cpu": 0.375, "memory_mb": 20480, "free_mb": 12288}  # 30 of 80 ticks
    assert load.measure()["cpu"] == 0.0


def test_gpus_are_asked_for_as_long_as_they_answer(root, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\necho "$@" >> asked; echo "1, 97, 30211, 81559, 54, 412.31"; echo "3, [N/A], 5, 81559, 40, 71"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    load = Load(gpus=True, root=root, environment={"CUDA_VISIBLE_DEVICES": "1,3"})
    assert load.measure()["gpus"] == [
        {"gpu": 1, "utilization": 0.97, "memory_mb": 30211, "total_mb": 81559, "temperature_c": 54, "power_w": 412.31},
        {"gpu": 3, "memory_mb": 5, "total_mb": 81559, "temperature_c": 40, "power_w": 71},
    ]
    assert "--id=1,3" in (tmp_path / "asked").read_text()
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "gpus" not in load.measure()
    tool.write_text("#!/bin/sh\ntouch again\n")
    assert "gpus" not in load.measure()
    assert not (tmp_path / "again").exists()


def test_what_is_no_row_of_a_gpu_is_left_out():
    assert parse_gpus("\nUnable to determine the device handle\n") == []
