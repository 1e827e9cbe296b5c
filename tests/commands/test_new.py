"""`launch new`: a recipe chosen for images and a machine, or copied; each can be launched as it is."""

from __future__ import annotations

import shutil

import pytest
import yaml
from PIL import Image

from launcher import cli, start
from launcher.commands import new_choices
from launcher.plan import topology

CAT, DOG = "cat", "dog"


def fill(folder, num, *, colour=0, size=(90, 70), form="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num):
        Image.new("RGB", size, (colour, index, 7)).save(folder / f"{index}.{form}")


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Makes a recipe of images; returns its values, its text and what was printed."""
    monkeypatch.chdir(tmp_path)

    def make(*arguments):
        assert cli.main(["new", "mine", *map(str, arguments)]) == 0
        told, text = capsys.readouterr().out, (tmp_path / "mine.yaml").read_text()
        assert "next: launch mine.yaml --dry-run" in told
        assert cli.main(["mine.yaml", "--dry-run"]) == 0
        assert "* name: mine" in capsys.readouterr().out
        return yaml.safe_load(text), text, told

    return make


def divided(folder, train="train", val="val"):
    for split, num in ((train, 12), (val, 3)):
        for colour, name in enumerate((CAT, DOG)):
            fill(folder / split / name, num, colour=colour * 100 + num)


def one_folder(folder):
    for colour, name in enumerate((CAT, DOG)):
        fill(folder / name, 10, colour=colour * 100)


def other_names(folder):
    divided(folder, "training", "testing")


def lacking(folder):
    divided(folder)
    fill(folder / "train" / "fox", 12, colour=33)


def listed(folder):
    one_folder(folder)
    rows = [f"{name}/{index}.png,{name}" for name in (CAT, DOG) for index in range(10)]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]))
    return folder / "list.csv"


LAYOUTS = {
    divided: {},
    one_folder: {"val_fraction": 0.2},
    other_names: {"train": "training", "val": "testing"},
    lacking: {"missing_val_classes": "allow"},
    listed: {"val_fraction": 0.2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_in_any_known_layout_get_a_recipe_that_can_be_launched(layout, here, tmp_path):
    path = layout(tmp_path / "photos") or tmp_path / "photos"
    recipe, text, told = here("--data", path)
    data = recipe["data"]
    assert data.pop("path") == str(path)
    assert {key: data[key] for key in data if key not in ("image_size", "augment")} == LAYOUTS[layout]
    assert recipe["launch"]["device"] == "cpu"
    assert "classes: " in told
    assert text.count("# ") > 10


def test_what_is_wrong_with_the_images_is_told_and_heeded(here, tmp_path):
    photos = tmp_path / "photos"
    divided(photos)
    fill(photos / "train" / CAT, 150, colour=200, form="bmp")  # beside 12 of the other class
    (photos / "train" / CAT / "broken.png").write_bytes(b"no image")
    shutil.copy(photos / "train" / DOG / "0.png", photos / "val" / DOG / "same.png")
    recipe, _, told = here("--data", photos)
    assert recipe["data"]["on_bad_image"] == "quarantine"
    assert recipe["data"]["balance"] == "sampler"
    assert recipe["train"]["early_stopping"]["metric"] == "val/f1"
    assert "broken: 1 file; `launch check " in told
    assert "twice: 1 validation image also in training" in told


def test_many_small_images_are_learned_from_random_weights(here, tmp_path, monkeypatch):
    monkeypatch.setattr(new_choices, "FROM_SCRATCH", 20)
    divided(tmp_path / "photos")
    for image in (tmp_path / "photos").rglob("*.png"):
        Image.open(image).resize((28, 28)).save(image)
    recipe, _, _ = here("--data", tmp_path / "photos")
    assert recipe["model"] == {"arch": "resnet18", "weights": None}
    assert recipe["data"]["image_size"] == 32


def test_with_gpus_the_whole_network_learns(here, tmp_path, monkeypatch):
    found = topology.detect()
    monkeypatch.setattr(topology, "detect", lambda: topology.Topology(num_gpus=2, num_cores=16, host=found.host))
    divided(tmp_path / "photos")
    recipe, _, told = here("--data", tmp_path / "photos")
    assert recipe["model"]["arch"] == "resnet50"
    assert recipe["batch"] == {"size": "auto"}
    assert "launch" not in recipe
    assert "machine: 2 GPUs, 16 cores" in told


@pytest.mark.parametrize("name", [path.stem for path in start.recipes()])
def test_each_recipe_of_the_package_can_be_copied(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "mine", "--from", name]) == 0
    copy = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    original = yaml.safe_load((start.RECIPES / f"{name}.yaml").read_text())
    assert copy == original | {"name": "mine"}
    path = [] if "name" in original.get("data", {}) else [f"data.path={tmp_path}"]
    cli.main(["mine.yaml", *path, "--dry-run"])
    told = capsys.readouterr().err.splitlines()[1:]
    assert [line for line in told if "data." not in line and not line.startswith("    ")] == []  # but for the images


REFUSED = {
    ("mine", "--data", "/nowhere"): "/nowhere: no such folder",
    ("mine", "--data", "."): "known layouts:",
    ("mine",): "one of the arguments --data --from is required",
    ("mine", "--from", "quickstrat"): "did you mean 'quickstart'?",
    ("my recipe", "--from", "quickstart"): "valid: letters, digits",
    ("no/where", "--from", "quickstart"): "there is no folder no",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=str)
def test_what_cannot_be_is_refused_and_nothing_is_written(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", *arguments]) == 2
    assert REFUSED[arguments] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    assert cli.main(["new", "mine", "--from", "quickstart"]) == 2
    assert "mine.yaml: is there already" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "name: mine\n"


def test_images_of_no_known_layout_get_the_message_of_a_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "photos", 3)
    told = []
    for arguments in (["new", "mine", "--data", "photos"], ["photos_mobilenet_v2", "data.path=photos"]):
        assert cli.main(arguments) == 2
        told.append(capsys.readouterr().err.splitlines())
    assert told[0][2:8] == told[1][2:8]
    assert told[0][1].partition("data.path: ")[2] == told[1][1].partition("data.path: ")[2]
    assert "launch new NAME --data photos; or write a list" in told[0][-1]


def test_a_list_in_the_folder_is_named_by_the_same_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/list.csv").write_text("path,label\n")
    assert cli.main(["new", "mine", "--data", "photos"]) == 2
    shown = "  launch new NAME --data photos/list.csv, once this is mended: photos/list.csv: has no rows\n"
    assert capsys.readouterr().err.endswith(shown.replace("photos/list.csv: ", f"{tmp_path}/photos/list.csv: "))


def test_what_a_list_calls_its_columns_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "photos", 3)
    names = sorted(path.name for path in tmp_path.rglob("*.png"))
    rows = [f"{name.removesuffix('.png')},{'ab'[place % 2]}" for place, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["image_id,breed", *rows]))
    assert cli.main(["new", "mine", "--data", "labels.csv"]) == 0, capsys.readouterr().err
    found = yaml.safe_load((tmp_path / "mine.yaml").read_text())["data"]
    assert found["columns"] == {"label": "breed", "path": "photos/{image_id}.png"}
    assert cli.main(["mine.yaml", "--dry-run"]) == 0


@pytest.mark.parametrize("name", ["007", "on", "null", "1.5", "mine"])
def test_a_name_is_text_for_every_reader_of_yaml(name, tmp_path, monkeypatch):
    """The launcher takes it as it is written; editors and scripts read 7, true …."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", name, "--from", "quickstart"]) == 0
    for text in ((tmp_path / f"{name}.yaml").read_text(), new_choices.write(name, [], [])):
        assert yaml.safe_load(text)["name"] == name
