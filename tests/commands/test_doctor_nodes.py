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
