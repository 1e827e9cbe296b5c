from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.runs import run_dir
from launcher.runs.identity import new_run_id
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl, write_json_atomic, write_text_atomic

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    found = RunDir(tmp_path / "run")
    found.create()
    return found


def test_a_run_id_is_the_name_the_time_and_four_hex_digits(monkeypatch):
    ids = {new_run_id("photos") for _ in range(200)}
    assert all(re.fullmatch(r"photos-\d{8}-\d{6}-[0-9a-f]{4}", found) for found in ids)
    assert len(ids) > 150


def test_no_run_at_a_path_is_the_users_error(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere: not a run directory \(found nothing\)") as caught:
        RunDir.existing(tmp_path / "nowhere")
    assert caught.value.exit_code == 2
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"folder: not a run directory \(found a folder without recipe.yaml\)"):
        RunDir.existing(tmp_path / "folder")


def test_a_folder_with_somebodys_recipe_yaml_is_no_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    with pytest.raises(UsageError, match=r"not a run directory.*plan\.json"):
        RunDir.existing(tmp_path)


def test_an_existing_run_is_opened_and_knows_its_id(run):
    write_json_atomic(run.plan, {"run_id": "a-20260101-000000-beef"})
    write_text_atomic(run.recipe, "name: a\n")
    assert RunDir.existing(str(run.path)).run_id == "a-20260101-000000-beef"


def test_creating_twice_keeps_what_is_there(run):
    (run.logs / "old.log").write_text("kept")
    run.create()
    assert (run.logs / "old.log").read_text() == "kept"
    assert run.checkpoints.is_dir()


def test_status_is_pending_until_written_and_changes_field_by_field(run, monkeypatch):
    assert run.read_status() == {"state": "pending"}
    monkeypatch.setattr(run_dir.time, "time", lambda: 7.0)
    run.update_status(state="running", epoch=0)
    run.update_status(epoch=3)
    assert run.read_status() == {"state": "running", "epoch": 3, "updated": 7.0}


def test_events_and_metrics_carry_time_and_events_the_host(run, monkeypatch):
    monkeypatch.setattr(run_dir.time, "time", lambda: 7.0)
    monkeypatch.setenv("SLURMD_NODENAME", "node7")  # what can be excluded; the host name need not be the same
    run.append_event("checkpoint", step=5)
    run.append_metrics(split="val", top1=0.5)
    assert list(read_jsonl(run.events)) == [{"time": 7.0, "kind": "checkpoint", "host": "node7", "step": 5}]
    assert list(read_jsonl(run.metrics)) == [{"time": 7.0, "split": "val", "top1": 0.5}]
    monkeypatch.delenv("SLURMD_NODENAME")
    run.append_event("checkpoint", step=6)
    assert list(read_jsonl(run.events))[-1]["host"] == os.uname().nodename


def test_a_run_is_shown_by_its_shorter_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(RunDir("runs/a")) == "runs/a"
    assert str(RunDir("/a")) == "/a"


def test_file_names_are_those_of_the_contract(tmp_path):
    run = RunDir(tmp_path)
    names = {
        "recipe.yaml": run.recipe,
        "plan.json": run.plan,
        "status.json": run.status,
        "events.jsonl": run.events,
        "metrics.jsonl": run.metrics,
        "logs/attempt-2/rank-3.log": run.rank_log(2, 3),
        "errors/attempt-2/rank-3.json": run.rank_error(2, 3),
        "checkpoints/step-00000042": run.checkpoint(42),
        "checkpoints/last": run.last_checkpoint,
        "checkpoints/best": run.best_checkpoint,
        "exports": run.exports,
        "exports/manifest.json": run.export_manifest,
        "report.html": run.report_html,
        "report.json": run.report_json,
        "model_card.md": run.model_card,
        "wandb": run.wandb,
        "tensorboard": run.sink_folder("tensorboard"),
        "tracking/wandb.json": run.tracked("wandb"),
        "logs/tracking-wandb.log": run.tracking_log("wandb"),
    }
    assert {name: path.relative_to(tmp_path).as_posix() for name, path in names.items()} == {n: n for n in names}
