"""A sweep takes the road of a single run: all of its runs are admitted and recorded before the first one starts."""

from __future__ import annotations

import json
import shutil

import pytest

from launcher import backends, cli
from launcher.runs.run_dir import RunDir
from launcher.system import console


@pytest.fixture
def sweep(tmp_path, monkeypatch, images):
    """Run `launch … --sweep` over images of which one cannot be decoded; nothing is trained. Returns what started."""
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/train/cat/0.png").write_bytes(b"no image")
    (tmp_path / "recipe.yaml").write_text("model: {arch: resnet18, weights: null}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "protect", lambda: None)

    def launch(*arguments):
        started = []

        def train(plan):
            runs = [RunDir(path) for path in sorted((tmp_path / "sweep").glob("[0-9]-*"))]
            started.append((RunDir(plan.run_dir), [json.loads(run.bad_images.read_text()) for run in runs]))
            return 0

        monkeypatch.setattr(backends, "load", lambda _plan: train)
        here = ("--sweep", "--run-dir", "sweep", "--backend", "torchrun", "--procs", "1", "data.path=images")
        return cli.main(["recipe.yaml", *here, *arguments]), started

    return launch


def test_bad_images_are_recorded_for_every_run_before_the_first_starts(sweep):
    _, started = sweep("data.on_bad_image=quarantine", "optim.lr=0.1,0.2")
    assert [run.path.name for run, _ in started] == ["0-optim.lr=0.1", "1-optim.lr=0.2"]
    for _, recorded in started:
        assert [[image["path"] for image in one["images"]] for one in recorded] == [["train/cat/0.png"]] * 2
        assert [one["attempt"] for one in recorded] == [1, 1]


def test_a_check_that_one_run_fails_keeps_all_from_starting(sweep, tmp_path, capsys):
    code, started = sweep("data.on_bad_image=quarantine,error", "optim.lr=0.1")
    assert (code, started) == (2, [])
    assert "1 image cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_what_is_wrong_with_any_of_its_recipes_is_said_at_once(sweep, tmp_path, capsys):
    code, started = sweep("optim.lr=0.1,-1", "train.epochs=1,0")
    assert (code, started) == (2, [])
    said = capsys.readouterr().err
    assert "2 problems in the recipe; nothing was started" in said
    assert not (tmp_path / "sweep").exists()
