"""What a machine does at the moment, by files as Linux writes them and by what nvidia-smi prints.

The lines of nvidia-smi are in the form that its manual describes; no GPU was here.
"""

from __future__ import annotations

import os

import pytest

from launcher.system.load import MOST_FAILURES, Load, parse_gpus

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
    assert "cpu" not in load.measure()  # no time has gone by


def test_gpus_are_asked_for_as_long_as_they_answer(root, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\necho "$@" >> asked; echo "1, 97, 30211, 81559, 54, 412.31"; echo "3, [N/A], 5, 81559, 40, 71"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    load = Load(gpus=True, root=root, environment={})
    assert load.measure()["gpus"] == [
        {"gpu": 1, "utilization": 0.97, "memory_mb": 30211, "total_mb": 81559, "temperature_c": 54, "power_w": 412.31},
        {"gpu": 3, "memory_mb": 5, "total_mb": 81559, "temperature_c": 40, "power_w": 71},
    ]
    answers = tool.read_text()
    for _ in range(2):
        tool.write_text("#!/bin/sh\nexit 9\n")
        assert all("gpus" not in load.measure() for _ in range(MOST_FAILURES - 1))
        tool.write_text(answers)
        assert len(load.measure()["gpus"]) == 2  # it is asked as long as it may answer again
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert all("gpus" not in load.measure() for _ in range(MOST_FAILURES))
    tool.write_text("#!/bin/sh\n: > again\n")
    assert "gpus" not in load.measure()
    assert not (tmp_path / "again").exists()


UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


@pytest.mark.parametrize(
    ("environment", "ids"),
    [
        ({}, ""),
        ({"CUDA_VISIBLE_DEVICES": "1,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, "1,3"),
        ({"CUDA_VISIBLE_DEVICES": "1,3"}, ""),  # CUDA's numbers, not nvidia-smi's
        ({"CUDA_VISIBLE_DEVICES": UUID}, UUID),
        ({"CUDA_VISIBLE_DEVICES": UUID[:12]}, ""),
        ({"CUDA_VISIBLE_DEVICES": f"MIG-{UUID}/1/0"}, ""),
    ],
)
def test_nvidia_smi_is_asked_for_those_gpus_that_it_calls_by_the_same_names(
    environment, ids, root, tmp_path, monkeypatch
):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked; echo "1, 97, 30211, 81559, 54, 412.31"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Load(gpus=True, root=root, environment=environment).measure()["gpus"]
    assert (tmp_path / "asked").read_text().partition("--id=")[2].strip() == ids


@pytest.mark.parametrize("none", ["", "-1", "NoDevFiles"])
def test_no_gpu_that_is_hidden_is_asked_for(none, root, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "1, 97, 30211, 81559, 54, 412.31"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "gpus" not in Load(gpus=True, root=root, environment={"CUDA_VISIBLE_DEVICES": none}).measure()


def test_what_is_no_row_of_a_gpu_is_left_out():
    assert parse_gpus("\nUnable to determine the device handle\n") == []
