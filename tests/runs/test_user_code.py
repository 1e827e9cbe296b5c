"""The user's code in a run: what is copied, what a resume takes, and how it is loaded."""

from __future__ import annotations

import json
import pickle
import sys

import pytest

from launcher.errors import RecipeError
from launcher.recipe import load as recipes
from launcher.runs import user_code, user_copies
from launcher.runs.run_dir import RunDir

NET = """
from parts import blocks
import torch, importlib

def build(num_classes):
    from helper import VALUE
    return VALUE, num_classes, __name__, blocks.Block

class Thing:
    pass
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A recipe with code beside it, more of it in the current folder, and a run directory to copy it to."""
    folder, here = tmp_path / "lab", tmp_path / "here"
    (folder / "parts").mkdir(parents=True)
    (here / "shared").mkdir(parents=True)
    files = {
        folder / "net.py": NET,
        folder / "parts" / "__init__.py": "from .blocks import Block\n",
        folder / "parts" / "blocks.py": "from shared.base import Base\nclass Block(Base): ...\n",
        folder / "parts" / "unused.py": "",
        folder / "helper.py": "VALUE = 1\n",
        folder / "unused.py": "",
        here / "shared" / "base.py": "class Base: ...\n",
        folder / "recipe.yaml": "data: {name: digits}\nmodel: {factory: 'net.py:build'}\n",
    }
    for file, text in files.items():
        file.write_text(text)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name in ("net", "helper", "parts", "parts.blocks", "shared", "shared.base", "user_net"):
        sys.modules.pop(name, None)


def gathered(path, run, *overrides, renew=False):
    recipe, source = recipes.load(str(path), overrides)
    return user_copies.gather(recipe, source, run, renew=renew)


def written(path, run, *overrides, renew=False):
    recipe, code = gathered(path, run, *overrides, renew=renew)
    run.path.mkdir(exist_ok=True)
    code.write(run.code)
    run.recipe.write_text(recipes.to_yaml(recipe))
    return recipes.read_resolved(run.recipe).model.factory


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def test_the_file_and_what_of_the_users_it_imports_is_copied(project, run):
    recipe, code = gathered(project / "recipe.yaml", run)
    assert sorted(code.files) == ["helper.py", "net.py", "parts/__init__.py", "parts/blocks.py", "shared/base.py"]
    assert recipe.model.factory == "code/net.py:build"
    assert code.packages["torch"]
    assert not run.path.exists()
    manifest = code.manifest()
    assert manifest["files"]["net.py"]["original"] == str(project / "net.py")
    assert manifest["references"]["code/net.py:build"]["given"] == "net.py:build"


def test_the_copy_is_what_is_loaded_and_keeps_its_names(project, run, tmp_path):
    factory = written(project / "recipe.yaml", run)
    for file in project.rglob("*.py"):
        file.unlink()
    value, _, module, block = user_code.load(factory)(num_classes=3)
    assert (value, module, block.__module__) == (1, "net", "parts.blocks")
    thing = user_code.load(factory.replace(":build", ":Thing"))()
    assert type(pickle.loads(pickle.dumps(thing))) is type(thing)  # noqa: S301  our own
    assert not list(run.code.rglob("*.pyc"))


def test_a_run_that_was_moved_loads_its_own_copy(project, run, tmp_path):
    written(project / "recipe.yaml", run)
    moved = RunDir(run.path.rename(tmp_path / "elsewhere"))
    found = user_code.load(recipes.read_resolved(moved.recipe).model.factory)
    assert found.__globals__["__file__"] == str(moved.code / "net.py")


def test_two_runs_in_one_process_each_load_their_own(project, tmp_path):
    values = []
    for number in (1, 2):
        (project / "helper.py").write_text(f"VALUE = {number}\n")
        factory = written(project / "recipe.yaml", RunDir(tmp_path / f"run-{number}"))
        values.append(user_code.load(factory)(num_classes=2)[0])
    assert values == [1, 2]


def test_a_resume_goes_on_with_the_copy_and_tells_what_has_changed(project, run, capsys):
    written(project / "recipe.yaml", run)
    (project / "helper.py").write_text("VALUE = 22\n")
    for path in (run.recipe, project / "recipe.yaml"):  # `launch resume RUN`, `launch RECIPE --resume --run-dir RUN`
        recipe, code = gathered(path, run)
        assert recipe.model.factory == "code/net.py:build"
        assert code.files["helper.py"] == b"VALUE = 1\n"
        user_code.tell_of_changes(run, code.changed)
        told = capsys.readouterr().out
        assert f"{project / 'helper.py'} has changed since the run was launched" in told
        assert "--new-code" in told
    event = json.loads(run.events.read_text().splitlines()[-1])
    assert (event["kind"], event["used"]) == ("user_code_changed", "copy")


def test_an_unchanged_original_or_one_that_is_gone_is_no_news(project, run):
    written(project / "recipe.yaml", run)
    assert gathered(run.recipe, run)[1].changed == []
    (project / "helper.py").unlink()
    (project / "net.py").unlink()
    assert gathered(run.recipe, run)[1].changed == []


def test_new_code_is_taken_where_that_is_asked_for(project, run):
    written(project / "recipe.yaml", run)
    (project / "helper.py").write_text("VALUE = 22\n")
    factory = written(run.recipe, run, renew=True)
    assert user_code.load(factory)(num_classes=2)[0] == 22
    assert gathered(run.recipe, run)[1].changed == []
    (project / "net.py").unlink()
    with pytest.raises(RecipeError, match="no such file"):
        gathered(run.recipe, run, renew=True)


def test_another_reference_is_added_to_what_the_run_has(project, run):
    written(project / "recipe.yaml", run)
    (project / "other.py").write_text("import helper\ndef build(num_classes): return helper.VALUE + 100\n")
    (project / "helper.py").write_text("VALUE = 22\n")
    factory = written(run.recipe, run, f"model.factory={project}/other.py:build")
    assert factory == f"{run.code}/other.py:build"
    assert user_code.load(factory)(num_classes=2) == 101  # with the helper that the run began with


def test_a_name_that_only_the_new_original_has_is_refused(project, run):
    written(project / "recipe.yaml", run)
    (project / "net.py").write_text(f"{NET}\ndef larger(num_classes): ...\n")
    with pytest.raises(RecipeError, match=r"the run's copy, .*net\.py, has no 'larger'.*--new-code"):
        gathered(run.recipe, run, f"model.factory={project}/net.py:larger")


def test_an_installed_package_is_named_with_its_version_and_not_copied(project, run):
    recipe, code = gathered(project / "recipe.yaml", run, "model.factory=torchvision.models:resnet18")
    assert recipe.model.factory == "torchvision.models:resnet18"
    assert code.files == {}
    assert code.packages["torchvision"]


def test_two_files_that_would_be_one_module_are_refused(project, run):
    other = project / "deeper"
    other.mkdir()
    (other / "net.py").write_text("def build(num_classes): ...\n")
    written(project / "recipe.yaml", run)
    with pytest.raises(RecipeError, match=r"deeper/net\.py and .*lab/net\.py would both be the module 'net'"):
        gathered(run.recipe, run, f"model.factory={other}/net.py:build")


def test_an_installed_module_that_misses_is_explained(project, run):
    (project / "net.py").write_text(
        "import importlib\nimportlib.import_module('hel' + 'per2')\ndef build(num_classes): ..."
    )
    factory = written(project / "recipe.yaml", run)
    with pytest.raises(ModuleNotFoundError) as caught:
        user_code.load(factory)
    assert "what is found in another way has to be installed" in caught.value.__notes__[0]


def test_a_call_passes_what_is_always_passed_and_what_the_recipe_adds():
    made = user_code.call("model.factory", lambda num_classes, width: (num_classes, width), {"width": 4}, num_classes=3)
    assert made == (3, 4)
    assert user_code.call("model.factory", dict, {"a": 1}, num_classes=3) == {"num_classes": 3, "a": 1}
