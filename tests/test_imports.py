"""What a command imports, and which part may know which (design, "Dependency floors")."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "launcher"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py")])  # rglob follows no symlink
HEAVY = {
    "torch",
    "torchvision",
    "omegaconf",
    "submitit",
    "rich",
    "wandb",
    "pydantic",
    "yaml",
    "numpy",
    "onnx",
    "sklearn",
    "torchmetrics",
}

# From the ground up: folders, and the files beside them. A file imports from its own floor, or from below.
FLOORS = (
    "system",
    "errors",
    "images",
    "recipe",
    "plan",
    "runs",
    "tracking",
    "report",
    "engine",
    "tools",
    "node",
    "backends",
    "start",
    "commands",
    "cli",
    "__main__",
)
SCREENS = {"launcher.commands.watch_screen": {"rich"}}
"""Drawn by rich from top to bottom, and imported where there is a terminal."""
SCHEMAS = {
    "launcher.recipe.schema",
    "launcher.recipe.schema_data",
    "launcher.recipe.schema_model",
    "launcher.recipe.schema_post",
    "launcher.recipe.schema_train",
    "launcher.recipe.load",
    "launcher.recipe.types",
    "launcher.plan.profile",
}
"""Imported at first use: their schema is pydantic's words."""


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "launcher" else ("launcher", *parts))
    return name.removesuffix(".__init__")


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def is_for_types_only(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree, *, inside_functions, types=False):
    """Dotted names of the modules that a tree imports."""
    queue = list(tree.body)
    while queue:
        node = queue.pop()
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=str() as module, names=names, level=0):
                # `from launcher import node` names a module, `from launcher.errors import UsageError` a thing in one.
                for name in names:
                    inner = f"{module}.{name.name}"
                    yield inner if inner in MODULES else module
            case ast.ImportFrom():
                raise AssertionError(f"a relative import: {ast.unparse(node)}")
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if not inside_functions:
                pass
            case ast.If() if is_for_types_only(node) and not types:
                queue += node.orelse
            case _:
                queue += ast.iter_child_nodes(node)


def is_under(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def own(names):
    return {name for name in names if is_under(name, "launcher")}


def tops(names):
    return {name.partition(".")[0] for name in names}


ENGINE = {name for name in MODULES if is_under(name, "launcher.engine")}
TOOLS = {name for name in MODULES if is_under(name, "launcher.tools")}
LAUNCHER_SIDE = sorted(set(MODULES) - ENGINE - TOOLS)


def floor_of(name):
    return FLOORS.index(name.split(".")[1]) if name != "launcher" else -1


def test_there_are_parts_of_every_kind():
    assert len(ENGINE) > 10
    assert len(TOOLS) >= 3
    assert len(LAUNCHER_SIDE) > 20
    assert (PACKAGE / "tools").resolve() == ROOT / "tools"


@pytest.mark.parametrize("name", LAUNCHER_SIDE)
def test_the_launcher_side_imports_nothing_heavy_by_being_imported(name):
    allowed = {"pydantic", "yaml"} if name in SCHEMAS else SCREENS.get(name, set())
    named = set(imports(MODULES[name], inside_functions=False))
    assert tops(named) & HEAVY <= allowed
    assert {module for module in named if is_under(module, "launcher.engine", "launcher.tools")} == set()


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"launcher"}))  # which is the interface to all of it
def test_imports_go_down_and_never_up(name):
    floor = floor_of(name)
    for imported in own(imports(MODULES[name], inside_functions=True, types=True)):
        below = floor_of(imported)
        assert below <= floor, f"{name} (floor {floor}) imports {imported} (floor {below})"


def test_modules_that_engine_and_launcher_share_import_the_standard_library_only():
    assert tops(imports(MODULES["launcher.system.processes"], inside_functions=True)) <= set(sys.stdlib_module_names)
    assert tops(imports(MODULES["launcher.system.redact"], inside_functions=True)) <= set(sys.stdlib_module_names)
    assert tops(imports(MODULES["launcher.system.console"], inside_functions=True)) <= set(sys.stdlib_module_names)
    named = set(imports(MODULES["launcher.errors"], inside_functions=True)) - {
        "launcher.system.redact",
        "launcher.system.console",
        "launcher.system.phases",
    }
    assert tops(named) <= set(sys.stdlib_module_names)


def test_no_two_files_import_each_other():
    graph = {
        name: own(imports(tree, inside_functions=True, types=True)) & set(MODULES) - {name}
        for name, tree in MODULES.items()
    }
    order = tuple(graphlib.TopologicalSorter(graph).static_order())  # raises on a circle
    assert set(order) == set(MODULES)


def test_folders_and_files_stay_small():
    """Rooms that a reader can take in: files beside folders, lines of a file, lines of a function."""
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    assert len(list((PACKAGE / "engine").glob("*.py"))) <= 25
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


# --- what really is imported


def loaded_by(*arguments, cwd):
    """The modules in memory after `launch` ran with these arguments."""
    code = """
import json, sys
from launcher.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
print("\\n" + json.dumps({"code": code or 0, "modules": sorted(sys.modules)}))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        env=environment,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    return result["code"], tops(result["modules"])


LIGHT = HEAVY | {"onnxruntime", "safetensors", "PIL", "jinja2", "markupsafe", "psutil"}


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (["--help"], LIGHT),
        (["--version"], LIGHT),
        (["recipes"], LIGHT),
        (["why", "--help"], LIGHT),
        (["quickstart", "--dry-run"], LIGHT - {"omegaconf", "pydantic", "yaml"}),
        (["photos_mobilenet_v2", "--dry-run", "data.path=IMAGES"], LIGHT - {"omegaconf", "pydantic", "yaml"}),
        (["check", "IMAGES"], LIGHT),
        (["schema"], LIGHT - {"omegaconf", "pydantic", "yaml"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_imports_only_what_it_needs(arguments, forbidden, images, tmp_path):
    arguments = [argument.replace("IMAGES", str(images)) for argument in arguments]
    code, loaded = loaded_by(*arguments, cwd=tmp_path)
    assert code == 0
    assert "launcher" in loaded
    assert loaded & forbidden == set()


def test_what_is_wrong_with_a_recipe_is_said_without_torch(tmp_path):
    code, loaded = loaded_by("quickstart", "model.arch=resnett", "optim.lrr=1", cwd=tmp_path)
    assert code == 2
    assert loaded & {"torch", "torchvision", "numpy"} == set()
