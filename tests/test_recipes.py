"""Every recipe of the package: it loads, plans, says how it is run, and takes a few steps (house rule 12)."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.plan.plan import make_plan
from launcher.plan.request import Request
from launcher.plan.topology import Topology
from launcher.recipe import load as recipes
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl
from tests.conftest import CLASSES

FOLDER = Path(__file__).parents[1] / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))

pytestmark = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@pytest.fixture
def lists(images, tmp_path):
    """The same images in a list, and in one in which an image has several classes."""
    rows = [(path, path.parent.name) for path in sorted(images.rglob("*.png"))]
    (tmp_path / "one.csv").write_text("path,label\n" + "".join(f"{path},{name}\n" for path, name in rows))
    several = [f"{path},{';'.join({name, CLASSES[0]})}\n" for path, name in rows]
    (tmp_path / "several.csv").write_text("path,label\n" + "".join(several))
    return {"from_csv": tmp_path / "one.csv", "multi_label": tmp_path / "several.csv"}


@pytest.fixture
def data_of(images, lists):
    """Where the images are, for a recipe that leaves that to its user or would download them."""

    def find(file):
        if file.stem == "cifar10":
            return ["data.name=imagefolder", f"data.path={images}"]
        return [f"data.path={lists.get(file.stem, images)}"] if "???" in file.read_text() else []

    return find


def test_it_loads_and_plans_on_a_laptop_and_on_a_server(file, data_of):
    recipe, _ = recipes.load(str(file), data_of(file))
    assert recipe.name == file.stem
    for machine in (
        Topology(num_cores=2, num_gpus=0, host="laptop"),
        Topology(num_cores=64, num_gpus=8, host="server"),
    ):
        plan = make_plan(recipe, machine, Request(run_id="r-1"))
        assert plan.world_size >= 1
        assert plan.recipe == recipes.to_dict(recipe)


def test_it_can_be_tried_for_one_epoch(file, data_of):
    recipe, _ = recipes.load(str(file), [*data_of(file), "train.epochs=1"])
    assert recipe.train.epochs == 1


def test_its_data_are_the_only_thing_it_leaves_to_its_user(file):
    if "???" in file.read_text():
        with pytest.raises(RecipeError) as caught:
            recipes.load(str(file))
        assert [problem.key for problem in caught.value.problems] == ["data.path"]
    else:
        recipes.load(str(file))


def test_its_header_says_what_it_is_the_command_and_the_hardware(file):
    lines = file.read_text().splitlines()
    header = lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]
    assert header[0] == "# yaml-language-server: $schema=../recipe.schema.json"
    assert len(header[1]) > 30
    for word in (f"command:  launch recipes/{file.name}", "hardware: ", "time: ", "metric: "):
        (found,) = [line.strip("# ") for line in header if line.strip("# ").startswith(word)]
        assert not found.endswith("not measured"), f"{word}: what keeps it from being measured?"


@pytest.mark.slow
def test_it_runs_a_few_steps_in_this_process(file, data_of, warm_launch):
    # What cannot be had here (a download) or would take long (ImageNet's size) is put aside; all else is the recipe's.
    small = ("model.weights=null", "data.image_size=32", "batch.size=4", *data_of(file))
    done = warm_launch(file, "--debug", *small, "--run-dir", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(warm_launch.cwd / "run")
    metrics = list(read_jsonl(run.metrics))
    assert any(line["split"] == "val" and line["samples"] > 0 for line in metrics)
    assert len(events(run, "attempt_started")) == 1
    assert run.read_status()["state"] in ("completed", "early_stopped")
    assert recipes.read_resolved(run.recipe).model.arch == recipes.load(str(file), [*small])[0].model.arch
    assert not run.exports.exists()  # debugging ends with training
