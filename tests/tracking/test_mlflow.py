"""A local store of MLflow's, read by its client."""

from __future__ import annotations

import json

import pytest

from launcher.system.files import write_json_atomic
from tests.tracking.hand_made import RUN_ID, VAL, finish, make_run, track, train

pytest.importorskip("mlflow", reason="an extra: pip install 'finetune-launcher[mlflow]'")


def run_of(run, uri=None):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri or run.sink_folder("mlflow").as_uri())
    experiment = client.get_experiment_by_name("finetune-launcher")
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


@pytest.mark.slow
def test_a_local_store_has_a_run_across_a_kill_and_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = make_run(tmp_path, "disabled", wandb={"mode": "disabled", "tags": ["small"], "notes": "a try"})
    train(run, 10, 20)
    assert track(run, "mlflow") == []
    mark = json.loads(run.tracked("mlflow").read_text())
    write_json_atomic(run.tracked("mlflow"), mark | {"sent": 1, "before": []})  # killed before it had noted the second
    train(run, 20, 30, attempt=2)
    run.append_metrics(**VAL | {"step": 30})
    finish(run, best={"metric": "val/top1", "value": 0.5, "epoch": 0, "step": 30})
    assert track(run, "mlflow") == []
    client, found = run_of(run)
    assert (found.info.run_name, found.info.status) == (RUN_ID, "FINISHED")
    losses = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(10, 2.5), (20, 2.5), (30, 2.5)]
    assert [metric.step for metric in client.get_metric_history(found.info.run_id, "val/f1")] == [30]
    assert client.get_metric_history(found.info.run_id, "train/lr.head")[0].value == 0.1
    assert found.data.params["optim.lr"] == "0.01"
    assert found.data.tags["small"] == "true"
    assert found.data.tags["mlflow.note.content"] == "a try"
    assert found.data.tags["best"] == "val/top1 0.5000"
