"""References to the user's code: what is found, and what is said of one that does not fit, before anything is run."""

from __future__ import annotations

import pytest

from launcher.errors import RecipeError, UsageError
from launcher.recipe import load as recipes
from launcher.recipe import signatures, user_code, user_modules
from launcher.recipe.signatures import Call

NET = """
import functools
from blocks import block as imported

def build(num_classes, width=8):
    raise AssertionError("the check runs nothing")

class Net:
    def __init__(self, *, num_classes):
        pass

    @classmethod
    def small(cls, num_classes):
        return cls(num_classes=num_classes)

constant = 3
partial = functools.partial(build, width=4)
if constant:
    def inside(num_classes): ...

async def later(num_classes): ...
def needs_more(num_classes, depth): ...
def misspelled(num_clases): ...
def takes_nothing(): ...
def anything(**options): ...
"""


@pytest.fixture
def problems(recipe_file, monkeypatch, tmp_path):
    """What is wrong with a recipe that has this reference, with net.py beside it."""

    def find(reference, *overrides, text=NET):
        path = recipe_file(f"data: {{name: digits}}\nmodel:\n  factory: {reference}\n")
        (path.parent / "net.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        try:
            recipes.load(str(path), overrides)
        except RecipeError as error:
            return [f"{problem.where}|{problem.key}|{problem.message}" for problem in error.problems]
        return []

    return find


@pytest.mark.parametrize(
    "name", ["build", "Net", "Net.small", "imported", "partial", "inside", "anything", "Net.unknown_to_the_text"]
)
def test_what_can_be_called_is_accepted(problems, name):
    assert problems(f"net.py:{name}") == []


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("net.py", "is FILE.py:NAME or package.module:NAME"),
        ("net:buil d", "is FILE.py:NAME or package.module:NAME"),
        ("netz.py:build", "no such file in"),
        ("netz.py:build", "did you mean 'net.py'?"),
        ("folder/:build", "no such file in"),
        ("net.py:buil", "has no 'buil'; did you mean 'build'? it has: "),
        ("net.py:constant", "net.py:16: constant is 3, which cannot be called"),
        ("net.py:later", "is async"),
        ("net.py:needs_more", "net.py:22: needs_more needs 'depth', which nobody passes"),
        ("net.py:misspelled", "does not take 'num_classes'; did you mean 'num_clases'?"),
        ("net.py:takes_nothing", "does not take 'num_classes'; it takes nothing"),
        ("no_such_package.x:build", "there is no module 'no_such_package.x'"),
        ("torch.nn.functionall:relu", "there is no module"),
    ],
)
def test_what_does_not_fit_is_said_with_line_and_key(problems, reference, told):
    found = problems(reference)
    assert all(one.partition("|")[0].endswith("recipe.yaml:3") for one in found)
    assert all("|model.factory|" in one for one in found)
    assert any(told in one for one in found), found


def test_a_module_beside_the_recipe_is_found_by_its_name_too(problems):
    assert problems("net:build") == []


def test_arguments_of_the_recipe_count(problems):
    assert problems("net.py:needs_more", "model.factory_args.depth=3") == []
    (found,) = problems("net.py:build", "model.factory_args.widht=3")
    assert "does not take 'widht'; did you mean 'width'?" in found
    (found,) = problems("null", "model.factory_args.width=3")
    assert "|model.factory_args|are for what model.factory names, which is null" in found


def test_a_file_with_a_syntax_error_is_named_with_its_line(problems):
    (found,) = problems("net.py:build", text="def build(num_classes):\n    return (\n")
    assert "net.py:2: not valid Python" in found


def test_a_signature_is_found_through_an_import(problems, recipe_file):
    folder = recipe_file("").parent
    (folder / "parts").mkdir()
    (folder / "parts" / "__init__.py").write_text("from .inner import build\n")
    (folder / "parts" / "inner.py").write_text("def build(classes): ...\n")
    assert "inner.py:1: build does not take 'num_classes'" in problems("parts:build")[0]
    assert problems("net.py:build", text="from parts import *\n") == []


def test_the_command_line_means_the_current_folder_first(recipe_file, tmp_path, monkeypatch):
    path = recipe_file("data: {name: digits}\n")
    (path.parent / "net.py").write_text("")
    (tmp_path / "net.py").write_text("def build(num_classes): ...\n")
    monkeypatch.chdir(tmp_path)
    recipes.load(str(path), ["model.factory=net.py:build"])
    path.write_text("data: {name: digits}\nmodel: {factory: 'net.py:build'}\n")
    with pytest.raises(RecipeError, match="has no 'build'"):
        recipes.load(str(path))


@pytest.mark.parametrize(
    ("name", "module"),
    [("net", "net"), ("my-net", "user_my_net"), ("types", "user_types"), ("launcher", "user_launcher")],
)
def test_the_name_of_a_module_is_its_files_where_python_has_none_of_it(tmp_path, name, module):
    file = tmp_path / f"{name}.py"
    file.write_text("def f(): ...\n")
    assert user_code.resolve(f"{file}:f", []).module == module


def test_a_file_in_packages_is_imported_from_the_folder_around_them(tmp_path):
    (tmp_path / "lab" / "nets").mkdir(parents=True)
    for folder in ("lab", "lab/nets"):
        (tmp_path / folder / "__init__.py").write_text("")
    file = tmp_path / "lab" / "nets" / "net.py"
    file.write_text("")
    assert user_modules.name_of(file) == (tmp_path, "lab.nets.net")


def test_installed_modules_are_found_without_importing_them():
    found = user_modules.find("torch.utils.data.dataset", [])
    assert found.root is None
    assert found.file.name == "dataset.py"
    assert user_modules.find("json.decoder", []).root is None


def test_calls_by_position():
    (node,) = [signatures.find(user_modules.ast.parse("def f(logits, labels, *, scale): ..."), "f")]
    assert list(signatures.find_problems(node, Call(positional=("logits", "labels")), {"scale": 1})) == []
    (problem,) = signatures.find_problems(node, Call(positional=("a", "b", "c")), {"scale": 1})
    assert problem.startswith("takes 2 arguments by position")
    (problem,) = signatures.find_problems(node, Call(positional=("a", "b")), {})
    assert problem.startswith("needs 'scale'")


def test_a_reference_has_one_form(tmp_path):
    with pytest.raises(UsageError, match=r"a reference is FILE\.py:NAME"):
        user_code.resolve("net.py:", [tmp_path])
