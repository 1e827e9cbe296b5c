"""`launch push`: what passed is shared with its card, all of it or nothing; what is wrong is told before."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from launcher import cli
from launcher.recipe import load as recipes
from launcher.recipe.schema import ModelConfig, Recipe
from launcher.recipe.schema_data import DataConfig
from launcher.runs.run_dir import RunDir
from launcher.system.files import write_json_atomic
from launcher.tracking import wandb_folder, wandb_mode
from tests.tools.test_predict import COLOURS, PREPROCESSING, write_model

PLAN = {"run_id": "push-1", "name": "push", "command": [], "created": 0.0, "backend": "local", "device": "cpu"}
PLAN |= {"nodes": 1, "procs_per_node": 1, "world_size": 1, "host": "here"}


def row(name, file, **values):
    measured = {"top1": 0.9, "top1_drop": 0.0, "agreement": 1.0, "size_mb": 0.1, "latency_p50_ms": 1.0}
    return {"format": name, "file": file, "accepted": True, "reason": None, "quantization": None} | measured | values


@pytest.fixture
def run(tmp_path):
    """A run whose ONNX file passed and whose int8 did not."""
    made = RunDir(tmp_path / "run")
    made.create()
    write_json_atomic(made.plan, PLAN)
    recipe = Recipe(name="push", model=ModelConfig(arch="resnet18"), data=DataConfig(path="/photos"))
    made.recipe.write_text(recipes.to_yaml(recipe))
    made.update_status(state="completed", best={"metric": "val/top1", "value": 0.9, "epoch": 0, "step": 3})
    made.exports.mkdir()
    write_model(made.exports / "model.onnx")
    (made.exports / "model.int8.onnx").write_bytes(b"refused")
    exports = [row("onnx", "model.onnx"), row("int8", "model.int8.onnx", accepted=False, reason="loses too much")]
    manifest = {"run_id": "push-1", "checkpoint": {"step": 3}, "classes": list(COLOURS), "val_samples": 10}
    manifest |= {"reference": exports[0] | {"format": "pytorch"}, "not_measured": None}
    manifest |= {"preprocessing": PREPROCESSING.describe(), "exports": exports, "not_made": [], "ladder": []}
    write_json_atomic(made.export_manifest, manifest)
    return made


def push(run, target, capsys, *more):
    code = cli.main(["push", str(run), "--to", str(target), *more])
    return code, capsys.readouterr()


def test_a_folder_gets_the_card_and_what_passed_and_the_cards_code_works_there(run, tmp_path, capsys):
    target = tmp_path / "shared" / "model"
    for _ in range(2):  # an earlier push gives way
        code, said = push(run, target, capsys)
        assert (code, said.out) == (0, f"pushed: {target}\n")
    files = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert files == {"README.md", "model.json", "recipe.yaml", "exports/model.onnx", "exports/manifest.json"}
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    facts = json.loads((target / "model.json").read_text())
    assert (facts["classes"], facts["preprocessing"]["image_size"]) == (list(COLOURS), PREPROCESSING.image_size)
    Image.new("RGB", (40, 30), COLOURS["blue"]).save(target / "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", (target / "README.md").read_text(), re.DOTALL)
    assert subprocess.check_output([sys.executable, "-I", "-c", code], cwd=target, text=True) == "blue\n"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: run.export_manifest.unlink(), "has no exports; `launch export"),
        (lambda run: (run.exports / "model.onnx").unlink(), "no export has passed its gate"),
        (lambda run: run.update_status(best={"step": 9}), "its exports are of step 3, not of the best"),
    ],
)
def test_without_exports_that_passed_nothing_is_shared(spoil, words, run, tmp_path, capsys):
    spoil(run)
    code, said = push(run, tmp_path / "shared", capsys)
    assert code == 2
    assert words in said.err
    assert not (tmp_path / "shared").exists()


def test_another_folder_is_left_alone_and_a_push_that_fails_leaves_the_earlier_one(run, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    code, said = push(run, other, capsys)
    assert code == 2
    assert "holds something else than an earlier push" in said.err
    target = tmp_path / "shared"
    assert push(run, target, capsys)[0] == 0
    before = (target / "README.md").read_bytes()
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    code, said = push(run, target, capsys)
    assert code == 2
    assert "No space left on device; what was there stays" in said.err
    assert (target / "README.md").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "other", "shared"}


def test_the_hub_asks_for_a_name_its_library_and_a_token(run, capsys, monkeypatch):
    assert "valid: hub:OWNER/NAME" in push(run, "hub:model", capsys)[1].err
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "huggingface_hub", None)
        code, said = push(run, "hub:me/model", capsys)
        assert (code, "pip install 'finetune-launcher[hub]'" in said.err) == (2, True)
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    code, said = push(run, "hub:me/model", capsys)
    assert (code, "no token of the hub" in said.err) == (2, True)


def test_what_goes_to_the_hub_is_a_whole_folder_whose_card_the_hub_can_read(run, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    sent = {}

    class Api:
        def create_repo(self, name, **options):
            sent.update(name=name, **options)

        def upload_folder(self, *, folder_path, **options):
            from pathlib import Path

            sent.update(options)
            sent["files"] = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*.*")}
            card = hub.ModelCard.load(Path(folder_path) / "README.md")
            sent["card"] = card.data

    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    monkeypatch.setattr(hub, "HfApi", Api)
    assert push(run, "hub:me/model", capsys)[0] == 0
    assert (sent["name"], sent["private"]) == ("me/model", True)
    assert {"README.md", "exports/model.onnx", "model.json"} <= sent["files"]
    assert sent["card"].pipeline_tag == "image-classification"
    assert sent["delete_patterns"] == ["exports/*"]  # a later push has other formats
    assert push(run, "hub:me/model", capsys, "--public")[0] == 0
    assert sent["private"] is False
    monkeypatch.setattr(Api, "create_repo", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route")))
    code, said = push(run, "hub:me/model", capsys)
    assert (code, "the hub did not take it: no route" in said.err) == (1, True)


class Tracked:
    """A run of wandb's as far as a push needs one; the server refuses the artifact where ``problem`` says so."""

    def __init__(self, folder, problem):
        self.problem = problem
        record = folder / "wandb" / "offline-run-1-push-1"  # where wandb makes its records
        record.mkdir(parents=True)
        (record / "run-push-1.wandb").touch()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def log_artifact(self, _):
        return self

    def wait(self):
        if self.problem:
            raise ValueError(self.problem)


@pytest.fixture
def wandb_like(monkeypatch):
    """Stands in for wandb's server: a function that says how an artifact is taken, and in which mode."""
    wandb = pytest.importorskip("wandb")

    def answer(mode, problem=""):
        monkeypatch.setattr(wandb_mode, "resolve_mode", lambda _: (mode, None))
        monkeypatch.setattr(wandb, "init", lambda **options: Tracked(options["dir"], problem))

    return answer


def test_what_the_server_of_wandb_does_not_take_is_not_called_pushed(run, capsys, wandb_like):
    wandb_like("online", "quota is full")
    code, said = push(run, "wandb", capsys)
    assert (code, said.out) == (1, "")
    assert "W&B did not take it: quota is full" in said.err


def test_the_record_of_a_push_is_none_that_trackers_send_or_mark(run, capsys, wandb_like):
    wandb_like("offline", "nobody is asked")
    code, said = push(run, "wandb", capsys)
    assert code == 0
    (record,) = run.path.rglob("*.wandb")
    assert str(record.parents[1]) in said.out
    wandb_folder.mark_synced(run)
    assert not wandb_folder.is_synced(record.parent)
    assert wandb_folder.unsynced(run, []) == []


@pytest.mark.slow
def test_wandb_gets_the_same_files_as_an_artifact(run, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, said = push(run, "wandb", capsys)
    assert code == 0
    assert "the artifact model-push-1 (offline; send it with: wandb sync" in said.out
    assert list((run.path / "push" / "wandb").glob("offline-run-*/*.wandb"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert push(run, "wandb", capsys)[0] == 2
