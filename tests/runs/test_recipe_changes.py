"""With which other recipe a run may go on: decided before anything is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from launcher import cli, start
from launcher.errors import RecipeError, UsageError
from launcher.recipe import load as recipes
from launcher.recipe import schema as recipe_schema
from launcher.recipe.keys import flat
from launcher.recipe.paths import absolute
from launcher.runs import recipe_changes
from launcher.runs.history import events
from launcher.runs.recipe_changes import FIXED, OPEN
from launcher.runs.run_dir import RunDir

RECIPE = """\
name: a
model: {{arch: squeezenet1_1, weights: null}}
data: {{path: {images}, image_size: 32}}
batch: {{size: 4}}
optim: {{lr: 0.05, groups: {{head: 0.1}}}}
tracking: {{wandb: {{mode: disabled}}}}
launch: {{device: cpu}}
"""


@pytest.fixture
def file(recipe_file, images):
    return recipe_file(RECIPE.format(images=images))


@pytest.fixture
def begun(tmp_path, file):
    """A run that has a checkpoint, as far as its recipe and its ``state.json`` say."""

    def make(*, with_recipe=True, **values):
        run = RunDir(tmp_path / "run")
        run.create()
        recipe = absolute(recipes.load(str(file))[0])
        recipe = replace(recipe, **{k: replace(getattr(recipe, k), **v) for k, v in values.items()})
        run.recipe.write_text(recipes.to_yaml(recipe))
        facts = {"run_id": "a-1", "host": "elsewhere", "pid": 0, "process_started": "0", "debug": False}
        run.plan.write_text(json.dumps(facts))
        run.update_status(state="preempted", step=3)
        folder = run.checkpoint(3)
        folder.mkdir()
        state = {"step": 3, "classes": ["cat", "dog", "fox"], "train_set": "of others"}
        state |= {"recipe": recipes.to_dict(recipe)} if with_recipe else {}
        (folder / "state.json").write_text(json.dumps(state))
        return run

    return make


def found(run, file, *overrides):
    recipe, source = recipes.load(str(file), overrides)
    return {change.key: (change.old, change.new) for change in recipe_changes.find(run, recipe, source.where)}


def content_of(run):
    return {path: path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()}


def test_every_key_of_the_schema_is_in_exactly_one_of_the_tables():
    keys = [key for key, _ in flat(recipe_schema.Recipe())]
    assert sorted(keys) == sorted([*FIXED, *OPEN])
    assert all(any(key.startswith(one) for key in keys) for one in recipe_changes.TUNED)


def test_the_same_recipe_written_in_other_ways_is_no_change(begun, file, images, tmp_path, monkeypatch):
    run = begun()
    monkeypatch.chdir(images.parent)
    (tmp_path / "link").symlink_to(images)
    for same in (f"data.path={images.name}", f"data.path=../{images.parent.name}/{images.name}/"):
        assert found(run, file, same) == {}
    assert found(run, file, f"data.path={tmp_path}/link", "model.num_classes=3") == {}


def test_what_auto_stands_for_is_no_change(begun, file):
    run = begun(model={"arch": "resnet18", "weights": "DEFAULT"}, data={"image_size": "auto"})
    same = ("model.arch=resnet18", "model.weights=IMAGENET1K_V1", "data.image_size=224", "model.num_classes=3")
    assert found(run, file, *same) == {}


def test_a_recipe_of_before_a_key_was_there_had_its_default(begun, file):
    run = begun()
    state = json.loads((run.checkpoint(3) / "state.json").read_text())
    del state["recipe"]["train"]["on_nan"], state["recipe"]["post"]
    (run.checkpoint(3) / "state.json").write_text(json.dumps(state))
    assert found(run, file) == {}
    assert found(run, file, "train.on_nan=skip") == {"train.on_nan": ("stop", "skip")}


def test_a_run_of_before_large_files_were_decoded_smaller_goes_on_as_it_was(begun, file):
    run = begun()
    state = json.loads((run.checkpoint(3) / "state.json").read_text())
    del state["recipe"]["data"]["decode"]
    (run.checkpoint(3) / "state.json").write_text(json.dumps(state))
    recorded = run.recipe.read_text()
    run.recipe.write_text("".join(line for line in recorded.splitlines(True) if "decode:" not in line))
    assert recipes.read_resolved(run.recipe).data.decode == "exact"
    assert found(run, run.recipe) == {}
    assert found(run, run.recipe, "data.decode=fast") == {"data.decode": ("exact", "fast")}


def test_a_weights_file_that_was_moved_is_the_same_and_another_one_is_not(begun, file, tmp_path):
    for name in ("here/w.pth", "there/w.pth", "there/other.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    run = begun(model={"weights": str(tmp_path / "here/w.pth")})
    assert found(run, file, f"model.weights={tmp_path}/there/w.pth") == {}
    with pytest.raises(RecipeError, match=r"model\.weights: found .*other\.pth"):
        found(run, file, f"model.weights={tmp_path}/there/other.pth")


def test_what_can_change_is_listed_with_its_old_and_new_value(begun, file):
    changed = ("optim.lr=0.001", "train.epochs=40", "precision=bf16", "post.enabled=false", "data.workers=2")
    assert found(begun(), file, *changed) == {
        "optim.lr": (0.05, 0.001),
        "train.epochs": (20, 40),
        "precision": ("auto", "bf16"),
        "post.enabled": (True, False),
        "data.workers": ("auto", 2),
    }


def test_the_order_of_groups_counts(begun, file):
    run = begun(optim={"groups": {"*": 0.5, "head": 0.1}})
    old, new = found(run, file, "optim.groups.*=0.5")["optim.groups"]
    assert list(old) == ["*", "head"]
    assert list(new) == ["head", "*"]


def test_the_task_cannot_change(begun, file):
    with pytest.raises(RecipeError, match=r"data\.task: found single_label, but .*outputs mean something else"):
        found(begun(data={"task": "multi_label"}), file)


def test_all_that_cannot_change_is_named_at_once_with_old_value_new_value_and_reason(begun, file):
    changed = ("model.arch=resnet18", "model.num_classes=7", "optim.name=adamw", "seed=3", "data.image_size=64")
    with pytest.raises(RecipeError) as caught:
        found(
            begun(),
            file,
            *changed,
            "optim.lr=1",
            "model.head=mlp(64)",
            "data.crop_pct=0.5",
            "model.weights=DEFAULT",
            "data.background=black",
            "data.grey_range=[0, 4095]",
            "data.mean=[0.5]",
            "data.std=[0.5]",
            "data.interpolation=bicubic",
            "data.balance=sampler",
            "data.channels=1",
        )
    assert {problem.key for problem in caught.value.problems} == set(FIXED) - {
        "data.task"
    }  # with a data set of its own
    text = str(caught.value)
    for key, old, new in (
        ("model.arch", "squeezenet1_1", "resnet18"),
        ("optim.name", "sgd", "adamw"),
        ("data.image_size", 32, 64),
        ("model.num_classes", "auto", 7),
    ):
        assert f"command line ({key}={new}): {key}: found {new}, but the run has been trained with {old} and" in text
        assert FIXED[key] in text
    assert caught.value.exit_code == 2


def test_without_a_checkpoint_any_recipe_goes(begun, file):
    run = begun()
    (run.checkpoint(3) / "state.json").unlink()
    assert found(run, file, "model.arch=resnet18", "optim.name=adamw") == {}


def test_the_recipe_of_the_checkpoint_counts_and_not_one_that_was_written_after_it(begun, file):
    run = begun()
    other = recipes.load(str(file), ["model.arch=resnet18"])[0]
    run.recipe.write_text(recipes.to_yaml(other))
    assert found(run, file) == {}
    with pytest.raises(RecipeError, match=r"model\.arch: found resnet18"):
        found(run, run.recipe)


def test_a_checkpoint_of_before_it_held_its_recipe_is_compared_with_the_runs(begun, file):
    run = begun(with_recipe=False)
    assert found(run, file, "optim.lr=1") == {"optim.lr": (0.05, 1)}
    run.recipe.write_text("optim: {lrr: 1}\n")
    with pytest.raises(UsageError, match="the recipe that it was trained with cannot be read"):
        found(run, file)


WAYS = {
    "RECIPE --resume": lambda file, run: [str(file), "--run-dir", str(run), "--resume"],
    "dry run": lambda file, run: [str(file), "--run-dir", str(run), "--resume", "--dry-run"],
    "resume RUN": lambda file, run: ["resume", str(run)],
    "another node": lambda file, run: [
        *(str(file), "--run-dir", str(run), "--resume", "--nodes", "2", "--node-rank", "1"),
        *("--rdzv-endpoint", "127.0.0.1:29400"),
    ],
    "SLURM": lambda file, run: [str(file), "--run-dir", str(run), "--resume", "--backend", "slurm", "--procs", "1"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_cannot_go_on_stays_byte_for_byte_as_it_was(way, begun, file, capsys):
    run = begun()
    before = content_of(run)
    assert cli.main([*WAYS[way](file, run.path), "model.arch=resnet18", "seed=1"]) == 2
    said = capsys.readouterr().err
    assert "2 problems in the recipe; nothing was started" in said
    assert "model.arch: found resnet18" in said
    assert content_of(run) == before


def test_other_training_images_are_refused_before_anything_is_written(begun, file, capsys):
    run = begun()  # whose state.json says that they are others
    before = content_of(run)
    assert cli.main([str(file), "--run-dir", str(run.path), "--resume", "optim.lr=0.1"]) == 2
    assert "data.path: the training images are not those that the run began with" in capsys.readouterr().err
    assert content_of(run) == before


def test_changes_are_said_and_recorded_and_what_was_measured_for_others_is_forgotten(begun, file, capsys):
    run = begun()
    run.tuning.write_text("{}")
    recipe, source = recipes.load(str(file), ["optim.lr=0.001", "batch.accumulate=2"])
    changes = recipe_changes.find(run, recipe, source.where)
    start.record_changes(run, changes[1:])
    assert run.tuning.exists()
    start.record_changes(run, changes)
    assert not run.tuning.exists()
    assert "recipe changed: optim.lr: 0.05 -> 0.001\n" in capsys.readouterr().out
    recorded = [(e["key"], e["old"], e["new"]) for e in events(run, "recipe_changed")]
    assert recorded[0] == recorded[2] == ("optim.lr", 0.05, 0.001)
    assert recorded[1] == ("batch.accumulate", 1, 2)


def test_a_run_whose_images_were_moved_goes_on_where_they_are_now(begun, file, images, tmp_path, capsys):
    from launcher.engine import recipe_checks as checks
    from launcher.engine.data import ImageDataset

    run = begun(data={"path": "/gone"})
    assert cli.main(["resume", str(run.path)]) == 2
    said = capsys.readouterr().err
    assert "/gone: no such folder" in said
    assert f"; if it was moved: launch resume {run} data.path=FOLDER" in said
    now = shutil.copytree(images, tmp_path / "now")
    recipe, source = recipes.load(str(run.recipe), [f"data.path={now}"])
    state = json.loads((run.checkpoint(3) / "state.json").read_text())
    state["train_set"] = ImageDataset(images, "train", lambda image: image, seed=0).digest
    (run.checkpoint(3) / "state.json").write_text(json.dumps(state))
    assert [change.key for change in recipe_changes.find(run, recipe, source.where)] == ["data.path"]
    checks.check_train_set(run, recipe, source.where)
    (now / "train/cat/0.png").unlink()
    with pytest.raises(RecipeError, match=r"data\.path=.*: data\.path: the training images are not those"):
        checks.check_train_set(run, recipe, source.where)
