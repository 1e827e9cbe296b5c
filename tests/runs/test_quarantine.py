from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from launcher.errors import InterruptedRunError, RecipeError, TrainingError
from launcher.images import folder as image_folder
from launcher.recipe import load as recipes
from launcher.runs import history, quarantine
from launcher.runs.run_dir import RunDir
from launcher.system.files import write_json_atomic, write_text_atomic


@pytest.fixture
def folder(images, tmp_path):
    return shutil.copytree(images, tmp_path / "photos")


@pytest.fixture
def make(folder, tmp_path):
    """A recipe for the folder, and a run of it."""

    def _make(policy, **data):
        values = {"name": "imagefolder", "path": str(folder), "on_bad_image": policy, **data}
        recipe = recipes.from_dict({"data": values})
        run = RunDir(tmp_path / "run")
        run.create()
        write_json_atomic(run.plan, {"run_id": "r"})
        write_text_atomic(run.recipe, recipes.to_yaml(recipe))
        return recipe, run

    return _make


def listed(run):
    return {image["path"]: image["since_attempt"] for image in json.loads(run.bad_images.read_text())["images"]}


def prepare(run, attempt, *, node_rank=0, progress=lambda: None):
    quarantine.prepare(run, attempt=attempt, node_rank=node_rank, progress=progress)


def spoil(folder, *paths):
    for path in paths:
        (folder / path).write_bytes(b"")


def where(key):
    return f"recipe.yaml:3 {key}"


def test_a_class_of_several_that_a_split_never_had_is_not_lost(folder, make):
    """A rare one; and where images without a class are all that is bad, or left, that is judged by images."""
    rows = ["path,label,split", "a.png,x;y,train", "b.png,y;rare,train", "c.png,x,val", "d.png,y,val", "e.png,y,val"]
    source = next((folder / "train").glob("*/*.png"))
    for row in rows[1:]:
        shutil.copy(source, folder / row.split(",")[0])
    file = folder / "list.csv"

    def check(*bad, **data):
        file.write_text("\n".join([*rows, "f.png,,val", ""]))
        shutil.copy(source, folder / "f.png")
        spoil(folder, *bad)
        recipe, _ = make("quarantine", path=str(file), task="multi_label", **data)
        return quarantine.check(recipe, where)

    check("d.png")
    with pytest.raises(RecipeError, match=r"is left in val/y; add some"):
        check("e.png")
    check("e.png", missing_val_classes="allow")
    check("c.png", missing_val_classes="allow")  # f.png, which has no class, is left
    with pytest.raises(RecipeError, match=r"is left in val/x, val/y; add some"):
        check("f.png", missing_val_classes="allow")


def test_a_test_set_may_lose_a_class_and_not_all_images(folder, make):
    shutil.copytree(folder / "val", folder / "test")
    first, *others = sorted((folder / "test").iterdir())
    spoil(folder, *(file.relative_to(folder) for file in first.glob("*")))
    recipe, _ = make("quarantine", test="test")
    assert {image.split for image in quarantine.check(recipe, where).bad} == {"test"}
    spoil(folder, *(file.relative_to(folder) for other in others for file in other.glob("*")))
    with pytest.raises(RecipeError, match=r"no image that can be decoded is left in test/"):
        quarantine.check(recipe, where)


# Before anything is written


def test_good_images_pass_under_both_policies(make):
    for policy in ("error", "quarantine"):
        found = quarantine.check(make(policy)[0], where)
        assert len(found.images) == 24


def test_the_error_names_ten_files_and_the_place_in_the_recipe_and_the_cures(make, folder):
    paths = [f"train/{name}/{number}.png" for name in ("cat", "dog") for number in range(6)]
    spoil(folder, *paths)
    with pytest.raises(RecipeError) as caught:
        quarantine.check(make("error")[0], where)
    text = str(caught.value)
    assert "nothing was started" in text
    assert "recipe.yaml:3 data.path: data.path: 12 images cannot be decoded" in text
    assert sum(f"{path}: empty" in text for path in paths) == 10
    assert "and 2 more" in text
    for cure in ("repair or remove", "data.on_bad_image=quarantine", f"launch check {folder}"):
        assert cure in text


def test_quarantine_lets_bad_images_pass_but_not_a_class_without_any_other(make, folder):
    spoil(folder, "train/cat/0.png", "val/dog/0.png")
    assert len(quarantine.check(make("quarantine")[0], where).bad) == 2
    spoil(folder, "val/dog/1.png")
    with pytest.raises(RecipeError, match=r"no image that can be decoded is left in val/dog; add some"):
        quarantine.check(make("quarantine")[0], where)


def test_validation_images_that_are_training_images_are_one_line(make, folder, capsys):
    shutil.copy(folder / "train/cat/0.png", folder / "val/cat/8.png")
    shutil.copy(folder / "train/cat/1.png", folder / "val/cat/9.png")
    quarantine.check(make("error")[0], where)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: 2 of the validation images are training images too, byte for byte, as val/cat/8.png"
    )
    assert line.endswith(f"launch check {folder}")


# What the run directory says


def test_the_file_is_written_without_bad_images_and_for_the_digits_unscanned(make, monkeypatch, folder):
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(folder.parent))
    folder.rename(folder.parent / "digits")
    _, run = make("error", name="digits", path=None)
    prepare(run, 1)
    assert json.loads(run.bad_images.read_text()) == {
        "version": 1,
        "attempt": 1,
        "scanned": 0,
        "leaked": 0,
        "images": [],
    }
    assert image_folder.read_quarantine(run.bad_images) == frozenset()


def test_a_run_of_an_earlier_version_leaves_nothing_out(make):
    _, run = make("error")
    assert image_folder.read_quarantine(run.bad_images) == frozenset()


def test_quarantine_lists_and_tells_what_is_left_out_and_scans_once_an_attempt(make, folder, capsys):
    spoil(folder, "train/cat/0.png", "val/dog/0.png")
    _, run = make("quarantine")
    prepare(run, 1)
    assert capsys.readouterr().out == "2 images are left out: they cannot be decoded (bad_images.json)\n"
    assert listed(run) == {"train/cat/0.png": 1, "val/dog/0.png": 1}
    assert image_folder.read_quarantine(run.bad_images) == {"train/cat/0.png", "val/dog/0.png"}
    (event,) = history.events(run, "quarantined")
    assert event["images"] == ["train/cat/0.png", "val/dog/0.png"]
    spoil(folder, "train/fox/0.png")
    prepare(run, 1)
    assert len(listed(run)) == 2


def test_a_later_attempt_adds_what_is_newly_bad_and_keeps_what_was_mended(make, folder):
    spoil(folder, "train/cat/0.png")
    _, run = make("quarantine")
    prepare(run, 1)
    shutil.copy(folder / "train/cat/1.png", folder / "train/cat/0.png")
    spoil(folder, "train/dog/3.png")
    prepare(run, 2)
    assert listed(run) == {"train/cat/0.png": 1, "train/dog/3.png": 2}
    assert [event["images"] for event in history.events(run, "quarantined")] == [
        ["train/cat/0.png"],
        ["train/dog/3.png"],
    ]


def test_under_error_the_attempt_ends_before_it_begins_and_a_repair_is_enough(make, folder):
    spoil(folder, "train/cat/0.png")
    _, run = make("error")
    with pytest.raises(TrainingError, match=r"1 image cannot be decoded(.|\n)*train/cat/0.png: empty(.|\n)*launch why"):
        prepare(run, 1)
    assert listed(run) == {"train/cat/0.png": 1}
    assert run.read_status()["state"] == "failed"
    (ended,) = history.events(run, "attempt_ended")
    assert (ended["attempt"], ended["cause"]) == (1, "usage")
    assert "usage" in history.refusal(run)  # a job that is queued again does not try it again
    from launcher.runs import diagnose

    assert "train/cat/0.png" in diagnose.explain(run)
    shutil.copy(folder / "train/cat/1.png", folder / "train/cat/0.png")
    prepare(run, history.next_attempt(run))
    assert listed(run) == {}


@pytest.mark.parametrize("content", ["", '{"version": 1, "ima'])
def test_a_damaged_list_is_none_and_is_made_anew_with_an_event(make, folder, content):
    spoil(folder, "train/cat/0.png")
    _, run = make("quarantine")
    run.bad_images.write_text(content)
    assert image_folder.read_quarantine(run.bad_images) == frozenset()
    prepare(run, 1)
    assert listed(run) == {"train/cat/0.png": 1}
    (event,) = history.events(run, "bad_images_lost")
    assert str(run.bad_images) in event["message"]


# Several nodes


def test_other_nodes_wait_for_the_first_one_to_have_looked_for_this_attempt(make, folder):
    _, run = make("quarantine")
    prepare(run, 1)
    over = threading.Event()
    waiting = threading.Thread(target=lambda: (prepare(run, 2, node_rank=1), over.set()))
    waiting.start()
    assert not over.wait(1.5)
    spoil(folder, "train/cat/0.png")
    prepare(run, 2)
    assert over.wait(60)
    waiting.join()


def test_other_nodes_leave_as_well_where_the_images_are_refused(make, folder):
    spoil(folder, "train/cat/0.png")
    _, run = make("error")
    with pytest.raises(TrainingError):
        prepare(run, 1)
    with pytest.raises(TrainingError, match="node 0 names them"):
        prepare(run, 1, node_rank=1)


@pytest.mark.parametrize("node_rank", [0, 1])
def test_a_stop_ends_the_looking_and_the_waiting(node_rank, make):
    _, run = make("error")

    def stop():
        raise InterruptedRunError("stop")

    with pytest.raises(InterruptedRunError):
        prepare(run, 1, node_rank=node_rank, progress=stop)
    assert not run.bad_images.exists()


def test_waiting_does_not_last_for_ever(make, monkeypatch):
    monkeypatch.setattr(quarantine, "WAIT_S", 0.1)
    _, run = make("error")
    with pytest.raises(TrainingError, match=r"not written for attempt 1 after 0.1 s; node 0 does so"):
        prepare(run, 1, node_rank=1)


def test_the_engine_leaves_out_what_is_listed_and_finds_the_others_where_they_were(make, folder, monkeypatch):
    from launcher.engine.data import ImageDataset

    left_out = frozenset({"train/cat/0.png", "val/dog/1.png", "train/cat/no-longer-there.png"})
    whole = ImageDataset(folder, "val", None, seed=0)
    rest = ImageDataset(folder, "val", None, seed=0, left_out=left_out)
    assert [s for s in whole.samples if s not in rest.samples] == [(str(folder / "val/dog/1.png"), 1)]
    train = ImageDataset(folder, "train", None, seed=0)
    assert {train.samples[i][0] for i in train.find(left_out)} == {str(folder / "train/cat/0.png")}
    monkeypatch.chdir(folder)
    assert ImageDataset(Path(), "train", None, seed=0).find(left_out) == train.find(left_out)


# Classes that validation lacks


def test_with_missing_val_classes_allowed_one_class_may_be_without_validation_images(make, folder, capsys):
    spoil(folder, "val/dog/0.png", "val/dog/1.png")
    with pytest.raises(RecipeError, match="no image that can be decoded is left in val/dog"):
        quarantine.check(make("quarantine")[0], where)
    quarantine.check(make("quarantine", missing_val_classes="allow")[0], where)
    shutil.rmtree(folder / "val/dog")
    capsys.readouterr()
    quarantine.check(make("error", missing_val_classes="allow")[0], where)
    assert "warning: val/: no image of 'dog'; what is learned of them is not measured" in capsys.readouterr().err
    spoil(folder, *(f"val/{name}/{number}.png" for name in ("cat", "fox") for number in range(2)))
    with pytest.raises(RecipeError, match="is left in val/cat, val/fox"):
        quarantine.check(make("quarantine", missing_val_classes="allow")[0], where)


def test_images_whose_values_do_not_fit_their_range_are_refused_as_such(make, folder):
    import numpy as np
    from PIL import Image

    Image.fromarray(np.full((20, 20), 255, dtype="int32")).save(folder / "train/cat/deep.tif")
    with pytest.raises(
        RecipeError, match=r"1 image cannot be used with the values they have(.|\n)*integers from 255 to 255"
    ):
        quarantine.check(make("error")[0], where)
    quarantine.check(make("error", grey_range=[0.0, 255.0])[0], where)
