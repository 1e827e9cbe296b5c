"""Mistakes that people make in their first hour, each with what the message tells them to do."""

from __future__ import annotations

import pytest

from launcher import cli
from launcher.recipe import other_names
from launcher.recipe.schema import Recipe

MOST_LINES = 8
"""Of a message: what it says is read, not scrolled through."""
MISTAKES = {
    # keys as other tools have them, or without their section
    "quickstart epochs=5": "epochs: unknown key; it is train.epochs=5 here",
    "quickstart lr=0.1": "it is optim.lr=0.1 here",
    "quickstart learning_rate=0.1": "it is optim.lr=0.1 here",
    "quickstart batch_size=32": "it is batch.size=32 here",
    "quickstart batch=32": "batch: found 32; it is batch.size=32 here",
    "quickstart arch=resnet18": "it is model.arch=resnet18 here",
    "quickstart train.lr=0.1": "train.lr: unknown key; it is optim.lr=0.1 here",
    "quickstart pretrained=true": "it is model.weights here",
    "quickstart imgsz=64": "it is data.image_size=64 here",
    "quickstart optim.lrr=1": "did you mean 'lr'?",
    # options for keys, and the other way round
    "quickstart --epochs 5": "--epochs 5: no such option; keys of the recipe go without dashes: train.epochs=5",
    "quickstart --lr=0.1": "keys of the recipe go without dashes: optim.lr=0.1",
    "quickstart --batch-size 8 --epochs 5": "go without dashes: batch.size=8 train.epochs=5",
    "quickstart --seed 3": "go without dashes: seed=3",
    "quickstart --lr": "go without dashes: optim.lr=VALUE",
    "quickstart --gpu 8": "--gpu 8: no such option; did you mean '--gpus'?",
    "quickstart --frobnicate": "--frobnicate: no such option\n  `launch --help` lists what there is",
    "quickstart --dry": "did you mean '--dry-run'?",
    "quickstart --gpus": "argument --gpus: expected one argument",
    "quickstart --nodes 2:": "argument --nodes: found '2:'; valid: a number, or MIN:MAX",
    # spaces
    "quickstart train.epochs 5": "'train.epochs 5' is not an override; write train.epochs=5",
    "quickstart train.epochs = 5": "'train.epochs = 5' is not an override; write train.epochs=5",
    "quickstart train.epochs= 5": "'5' is not an override; write train.epochs=5",
    "quickstart train.epochs =5": "'train.epochs =5' is not an override; write train.epochs=5",
    "quickstart five epochs please": "'five epochs please' is not an override; write key=value",
    # words
    "": "the following arguments are required: RECIPE, as in `launch quickstart`",
    "train quickstart": "train is not a command; write: launch quickstart",
    "train mine.yaml epochs=5": "train is not a command; write: launch mine.yaml epochs=5",
    "frobnicate": "`launch recipes` lists the recipes, `launch --help` the commands",
    "quickstrat": "did you mean 'quickstart'?",
    "docter": "did you mean 'doctor'?",
    "resnet50": "resnet50 is a model, not a recipe; write: launch RECIPE model.arch=resnet50",
    "train.epochs=5": "is an override; the recipe comes first: launch RECIPE train.epochs=5",
    "mine.yaml": "mine.yaml: no such file; `launch recipes` lists those that come with it",
    "recipes quickstrat": "quickstrat: no such recipe; did you mean 'quickstart'?",
    "why": "the following arguments are required: RUN\n",
    "resume": "the following arguments are required: RUN\n",
    "why one two": "two: no such argument",
    "why runs/none": "`launch ps` lists the runs",
    "predict": "the following arguments are required: RUN|FILE, IMAGE\n",
    "predict runs/none a.jpg": "a.jpg: no such file, folder or pattern",
    "recipes --all": "--all: no such option",
    "resume runs/none --epochs 3": "go without dashes: train.epochs=3",
    # values
    "quickstart train.epochs=five": "train.epochs: found 'five'; valid: a whole number >= 1",
    "quickstart model.arch=resnet19": "did you mean 'resnet18'",
    "quickstart data.name=imagefolder data.path=/nowhere": "/nowhere: no such folder; it must hold train/CLASS/*.jpg",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_answered_with_what_to_write(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(typed.split()) == 2
    shown = capsys.readouterr()
    assert MISTAKES[typed] in shown.err
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    assert len(shown.err.splitlines()) <= MOST_LINES
    assert list(tmp_path.iterdir()) == []


def test_each_name_of_other_tools_leads_to_a_key_that_there_is():
    keys = list(other_names.leaves(Recipe))
    assert set(other_names.ELSEWHERE) <= set(keys)
    names = [name for known in other_names.ELSEWHERE.values() for name in known]
    assert len(names) == len(set(names))
    assert not {key.rpartition(".")[2] for key in keys} & set(names)  # else the alias would never be looked at


def test_a_recipe_of_the_package_is_found_as_readme_names_it_where_there_is_no_such_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes/quickstart.yaml", "launch.device=cpu", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "resnet18" in shown
    assert "\nnot checked  names of layers, your own code, the images, the cluster: a start checks them first" in shown
    own = tmp_path / "recipes" / "quickstart.yaml"
    own.parent.mkdir()
    own.write_text("epochs: 3\n")
    assert cli.main(["recipes/quickstart.yaml"]) == 2
    assert "recipes/quickstart.yaml:1: epochs: unknown key" in capsys.readouterr().err


def test_a_printed_recipe_can_be_launched(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "quickstart"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["mine.yaml", "launch.device=cpu", "--dry-run"]) == 0
