"""`launch lr-find`: the range test on a real small training, and nothing of it left."""

from __future__ import annotations

import math
import os
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from launcher.commands import lr_find
from launcher.engine.optimizing import rate_range
from launcher.errors import RecipeError, UsageError
from tests.nets import FACTORY

RECIPE = """\
name: small
data: {{path: {images}, image_size: 32, workers: 0, augment: none}}
batch: {{size: 9}}
optim: {{lr: 0.02, lr_batch_size: 9, groups: {{head: 0.1}}, {optim}}}
tracking: {{wandb: {{mode: disabled}}}}
launch: {{procs: 2, device: cpu}}
"""


@pytest.fixture
def find(images, recipe_file, tmp_path, monkeypatch, capsys):
    """Run the command on a recipe in a folder of its own; return exit code, what it said, and the folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments, optim="schedule: constant"):
        recipe = recipe_file(RECIPE.format(images=images, optim=optim), "small.yaml")
        code = lr_find.main([str(recipe), FACTORY, *arguments])
        return code, capsys.readouterr().out, tmp_path / "here"

    return run


def test_the_curve_is_drawn_the_rate_named_as_an_override_and_nothing_else_is_left(find, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    sizes = Path(os.environ["FINETUNE_LAUNCHER_CACHE"]) / "batch-sizes"  # of other tests, too
    before = [*sizes.glob("*")]
    code, said, folder = find("--steps", "40", "--start", "1e-3", "--end", "30")
    assert code == 0, said
    assert [file.name for file in folder.iterdir()] == ["small-lr-find.svg"]
    assert list((tmp_path / "tmp").iterdir()) == []
    root = ET.parse(folder / "small-lr-find.svg").getroot()  # noqa: S314  our own
    shapes = [element.tag.rpartition("}")[2] for element in root]
    assert shapes.count("circle") > 10
    assert shapes.count("polyline") == 1
    last = said.splitlines()[-1]
    rate, head = (float(part.rpartition("=")[2]) for part in last.removeprefix("to begin with: ").split())
    assert last.startswith(f"to begin with: optim.lr={rate:g} optim.groups.head=")
    assert head == pytest.approx(5 * rate, rel=0.1)
    assert [*sizes.glob("*")] == before


def test_its_rate_is_where_the_smoothed_loss_falls_fastest():
    rates = [10 ** (place / 20 - 4) for place in range(101)]
    losses = [2 / (1 + (rate / 1e-2) ** 1.5) + (rate / 0.5) ** 2 + 0.01 * (-1) ** n for n, rate in enumerate(rates)]
    found = rates[rate_range.steepest(rates, losses, rate_range.smoothed(losses))]
    assert 5e-3 < found < 2e-2


@pytest.mark.parametrize("losses", [[1.0 + 0.1 * (-1) ** n for n in range(50)], [0.1 * n for n in range(50)], [1.0]])
def test_where_the_loss_does_not_fall_none_is_suggested(losses):
    rates = [1.1**n for n in range(len(losses))]
    assert rate_range.steepest(rates, losses, rate_range.smoothed(losses)) is None


@pytest.mark.parametrize("num", [30, 100])
def test_chance_names_no_rate_and_what_falls_by_more_has_one(num):
    """By the range of what is left after smoothing alone 64 (of 100 steps) to 87 % (of 30) of flat curves had one."""
    draw, rates, found = np.random.default_rng(0), [1.1**n for n in range(num)], {True: 0, False: 0}
    early = 0
    for _ in range(50):
        for falls in found:
            losses = [2 - 0.4 * falls / (1 + math.exp(15 - 25 * n / num)) + draw.normal(0, 0.1) for n in range(num)]
            place = rate_range.steepest(rates, losses, rate_range.smoothed(losses))
            found[falls] += place is not None
            early += bool(falls) and place is not None and place < 0.4 * num  # chance, before it falls
    assert found[False] <= 7
    assert found[True] == 50
    assert early <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "3"], "--steps: found 3; valid: 10 or more"),
        (["--start", "1e-3"], "--start and --end: give both"),
        (["--start", "1", "--end", "0.1"], "valid: 0 < start < end"),
        (["--out", "nowhere/x.svg"], "there is no folder nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(find, arguments, words):
    with pytest.raises(UsageError, match=words):
        find(*arguments)


def test_what_is_wrong_with_the_recipe_is_said_too(find):
    with pytest.raises(RecipeError, match=r"optim\.groups\.hed"):
        find("optim.groups.hed=0.1", "--steps", "10")


def test_where_every_rate_is_too_high_none_is_named(find):
    code, said, _ = find("--steps", "20", "--start", "1e20", "--end", "1e30")
    assert code == 1
    assert "to begin with" not in said


def test_rates_are_written_as_people_do():
    assert [rate_range.round_to(rate) for rate in (0.0031622, 12.34, 1.05e-5)] == [0.0032, 12.0, 1e-05]
    assert math.isclose(rate_range.round_to(0.1), 0.1)
