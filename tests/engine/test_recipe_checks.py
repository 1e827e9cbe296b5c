from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.engine import recipe_checks
from launcher.errors import RecipeError
from launcher.recipe import load as recipes

CODE = """
import os, sys, torch
from launcher.engine import recipe_checks
from launcher.recipe import load
from launcher.system.processes import die_with_parent

torch.set_num_threads(2)
model = {"arch": "squeezenet1_1", "weights": None}
recipe = load.from_dict({"name": "a", "model": model, "data": {"path": sys.argv[1], "image_size": 32}})
recipe_checks.check(recipe, str)
assert torch.get_num_threads() == 2
child = os.fork()
if not child:
    die_with_parent()
    torch.ones(1 << 22).isfinite().all().item()
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


def test_a_process_that_has_checked_a_recipe_can_fork_others_that_compute(photos):
    """The supervisor forks the exports. OpenMP's threads do not survive that: a child would wait for them for ever."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(photos)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2"},
        check=False,
        timeout=240,
    )
    assert done.returncode == 0


SIZES = """
import sys
from launcher.system import lazy_dynamo, lazy_meta
lazy_dynamo.put_off()
lazy_meta.put_off()
from launcher.engine import recipe_checks
from launcher.errors import RecipeError
from launcher.recipe import load

def problems(size):
    model = {"arch": "squeezenet1_1", "weights": None}
    recipe = load.from_dict({"name": "a", "model": model, "data": {"path": sys.argv[1], "image_size": size}})
    try:
        recipe_checks.check(recipe, str)
    except RecipeError as error:
        return [str(problem) for problem in error.problems]
    return []

assert problems(32) == []
print(lazy_meta.is_put_off(), "sympy" in sys.modules)
refused = problems(16)
assert len(refused) == 1 and "squeezenet1_1 does not take images of 16 px" in refused[0]
assert problems(16) == refused
"""


def test_an_image_size_that_was_accepted_once_is_not_tried_again_and_one_that_was_refused_is(photos, tmp_path):
    """What is needed to try one takes a second to import, in every launch."""
    command = [sys.executable, "-W", "ignore", "-c", SIZES, str(photos)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "FINETUNE_LAUNCHER_CACHE": str(tmp_path)}
    first, again = (
        subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=240).stdout.splitlines()
        for _ in range(2)
    )
    assert first == ["False True"]
    assert again == ["True False"]
    (tmp_path / "image-sizes").rename(tmp_path / "moved")
    (tmp_path / "image-sizes").write_text("a file is in its place")
    assert subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=240).stdout


def test_a_group_for_which_others_leave_nothing_is_refused_and_told_in_a_run_that_has_begun(photos, capsys):
    """An earlier version began runs with such groups."""
    model, groups = {"arch": "resnet18", "weights": None}, {"layer1": 0.3, "head": 0.1, "layer4": 0.2, "fc": 0.4}
    data = {"path": str(photos), "image_size": 32}
    recipe = recipes.from_dict({"name": "a", "model": model, "data": data, "optim": {"groups": groups}})
    said = "all that it matches is taken by `head`, which comes first; put it before it"
    with pytest.raises(RecipeError) as caught:
        recipe_checks.check(recipe, str)
    assert [(one.key, one.message) for one in caught.value.problems] == [("optim.groups.fc", said)]
    recipe_checks.check(recipe, str, is_new=False)
    assert f"optim.groups.fc: {said}" in capsys.readouterr().out
