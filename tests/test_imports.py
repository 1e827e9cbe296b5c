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
SOURCES = sorted(
    path
    for folder in (PACKAGE, PACKAGE / "backends", PACKAGE / "commands", PACKAGE / "engine", ROOT / "tools")
    for path in folder.glob("*.py")
)
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
}

# From the ground up; a part imports from its own floor or from below it.
FLOORS = (
    {
        "launcher",
        "launcher.console",
        "launcher.errors",
        "launcher.files",
        "launcher.processes",
        "launcher.redact",
        "launcher.waiting",
    },
    {
        "launcher.run_dir",
        "launcher.topology",
        "launcher.network",
        "launcher.host_memory",
        "launcher.host_cpu",
        "launcher.host_cores",
        "launcher.loader_room",
        "launcher.image_folder",
        "launcher.image_left_out",
        "launcher.image_levels",
        "launcher.image_probe",
        "launcher.image_probe_pool",
        "launcher.image_scan",
        "launcher.image_scan_cache",
        "launcher.image_walk",
        "launcher.pixels",
        "launcher.catalog",
        "launcher.wandb_folder",
    },
    {
        "launcher.recipe",
        "launcher.recipe_source",
        "launcher.recipe_yaml",
        "launcher.recipe_changes",
        "launcher.recipe_types",
        "launcher.recipe_checks",
        "launcher.recipe_keys",
        "launcher.recipe_paths",
        "launcher.profile",
        "launcher.schema",
    },
    {
        "launcher.plan",
        "launcher.sbatch",
        "launcher.sweep",
        "launcher.slurm_client",
        "launcher.lint",
        "launcher.preflight",
        "launcher.history",
        "launcher.whereabouts",
        "launcher.diagnose",
        "launcher.findings",
        "launcher.job_end",
        "launcher.meeting",
        "launcher.submission",
        "launcher.variables",
        "launcher.quarantine",
        "launcher.report",
        "launcher.report_charts",
        "launcher.report_html",
        "launcher.report_markup",
        "launcher.report_model_card",
        "launcher.report_style",
    },
    {
        "launcher.agent",
        "launcher.agent_thread",
        "launcher.peers",
        "launcher.watchdog",
        "launcher.log_cap",
        "launcher.node",
        "launcher.job",
        "launcher.stopping",
        "launcher.backends",
        "launcher.commands",
    },
    {"launcher.cli", "launcher.__main__"},
)
FOR_ENGINE = {
    f"launcher.{name}"
    for name in ("console", "errors", "files", "recipe", "run_dir", "image_folder", "processes", "watchdog")
}
FOR_ENGINE |= {
    "launcher.wandb_folder",
    "launcher.redact",
    "launcher.host_memory",
    "launcher.host_cpu",
    "launcher.host_cores",
    "launcher.loader_room",
    "launcher.findings",
    "launcher.pixels",
}


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
    return next(
        (
            level
            for level, names in enumerate(FLOORS)
            if name in names or name.rpartition(".")[0] in names - {"launcher"}
        ),
        None,
    )


def test_there_are_parts_of_every_kind():
    assert len(ENGINE) > 10
    assert len(TOOLS) >= 3
    assert len(LAUNCHER_SIDE) > 20
    assert (PACKAGE / "tools").resolve() == ROOT / "tools"


@pytest.mark.parametrize("name", LAUNCHER_SIDE)
def test_the_launcher_side_imports_nothing_heavy_by_being_imported(name):
    if name in (
        "launcher.recipe",
        "launcher.profile",
        "launcher.schema",
    ):  # imported at first use: their schema is pydantic's words
        assert tops(imports(MODULES[name], inside_functions=False)) & HEAVY <= {"pydantic", "yaml"}
    else:
        assert tops(imports(MODULES[name], inside_functions=False)) & HEAVY == set()


@pytest.mark.parametrize("name", LAUNCHER_SIDE)
def test_the_launcher_side_names_engine_and_tools_only_as_strings(name):
    named = own(imports(MODULES[name], inside_functions=True))
    assert {module for module in named if is_under(module, "launcher.engine", "launcher.tools")} == set()


@pytest.mark.parametrize("name", LAUNCHER_SIDE)
def test_imports_go_down_and_never_up(name):
    floor = floor_of(name)
    assert floor is not None, f"{name} is new: give it a floor in this file"
    for imported in own(imports(MODULES[name], inside_functions=True)):
        below = floor_of(imported)
        assert below is not None, imported
        assert below <= floor, f"{name} (floor {floor}) imports {imported} (floor {below})"


@pytest.mark.parametrize("name", sorted(ENGINE))
def test_the_engine_imports_only_what_the_run_is_described_with(name):
    named = own(imports(MODULES[name], inside_functions=True, types=True))
    assert {module for module in named if module not in FOR_ENGINE and not is_under(module, "launcher.engine")} == set()


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_tools_import_that_and_the_engine(name):
    named = own(imports(MODULES[name], inside_functions=True, types=True))
    others = {module for module in named if not is_under(module, "launcher.engine", "launcher.tools")}
    assert others <= FOR_ENGINE


def test_what_the_engine_shares_with_the_launcher_side_needs_nothing_heavy_in_a_worker():
    assert tops(imports(MODULES["launcher.processes"], inside_functions=True)) <= set(sys.stdlib_module_names)
    assert tops(imports(MODULES["launcher.redact"], inside_functions=True)) <= set(sys.stdlib_module_names)
    assert tops(imports(MODULES["launcher.console"], inside_functions=True)) <= set(sys.stdlib_module_names)
    named = set(imports(MODULES["launcher.errors"], inside_functions=True)) - {"launcher.redact", "launcher.console"}
    assert tops(named) <= set(sys.stdlib_module_names)


def test_no_two_parts_need_each_other_to_be_imported():
    graph = {name: own(imports(tree, inside_functions=False)) & set(MODULES) - {name} for name, tree in MODULES.items()}
    order = tuple(graphlib.TopologicalSorter(graph).static_order())  # raises on a circle
    assert set(order) == set(MODULES)


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


LIGHT = HEAVY | {"onnxruntime", "safetensors", "PIL"}


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
