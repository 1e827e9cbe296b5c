"""What a check of a cluster's nodes is told; tests/slurm has it check some."""

from __future__ import annotations

import json

import pytest

from launcher.commands import doctor_nodes


@pytest.mark.parametrize(
    ("gpus", "name", "value"), [(8, "PYTORCH_NVML_BASED_CUDA_CHECK", "1"), (None, "CUDA_VISIBLE_DEVICES", "")]
)
def test_nodes_are_checked_in_the_environment_of_a_run(gpus, name, value, monkeypatch, tmp_path, capsys):
    """Counting GPUs must not start CUDA: the all-reduce is forked afterwards."""
    plans = []

    def ask(_command, folder, _env):
        plans.append(json.loads((folder / "plan.json").read_text()))
        return {"facts": [], "problems": {}}

    monkeypatch.setattr(doctor_nodes, "_ask", ask)
    monkeypatch.chdir(tmp_path)
    assert doctor_nodes.run(2, gpus=gpus, profile_name=None, as_json=True) == 0
    assert plans[0]["env"][name] == value
    assert json.loads(capsys.readouterr().out)["problems"] == {}


def test_speeds_are_shown_and_what_is_slow_is_told(monkeypatch, tmp_path, capsys):
    fact = dict.fromkeys(doctor_nodes.COLUMNS, "x") | {"free_gb": 99.7, "within_gb_s": 228.04, "between_gb_s": None}
    slow = fact | {"host": "n2", "between_gb_s": 1.26, "slow": "1.3 GB/s to n1; the median of the nodes is 44.0"}
    found = {"facts": [fact | {"host": "n1", "slow": ""}, slow], "problems": {}}
    monkeypatch.setattr(doctor_nodes, "_ask", lambda *_: found)
    monkeypatch.chdir(tmp_path)
    assert doctor_nodes.run(2, gpus=8, profile_name=None, as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-3:] == ["free_gb", "within_gb_s", "between_gb_s"]
    assert lines[1].split()[-3:] == ["100", "228.0", "-"]
    assert lines[2].split()[-3:] == ["100", "228.0", "1.3"]
    assert lines[3] == "slow: n2: 1.3 GB/s to n1; the median of the nodes is 44.0"
    assert lines[4] == "ok: an all-reduce over 2 nodes works"
