"""`launch package`: the folder serves the run's model elsewhere, without torch and without the run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import launcher
from launcher import cli
from launcher.recipe.schema import PostConfig
from launcher.tools import export, package
from tests import odd_images
from tests.served import ROOT, serving
from tests.tools.test_export import make_run, write_photos

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    photos = write_photos(tmp_path_factory.mktemp("photos"))
    post = PostConfig(export=["onnx"], quantize=[])
    made = make_run(tmp_path_factory.mktemp("run"), photos, arch="squeezenet1_1", post=post)
    export.export_run(made)
    return made


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """The environment of a process in which nobody can import torch, nor what is installed of ours."""
    folder = tmp_path_factory.mktemp("no_torch")
    for name in ("torch", "torchvision"):
        (folder / f"{name}.py").write_text("raise ImportError('there is no torch here')\n")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def packaged(run, tmp_path_factory):
    """The package, copied away from the run."""
    assert cli.main(["package", str(run.path)]) == 0
    copied = tmp_path_factory.mktemp("elsewhere") / "copied"
    shutil.copytree(run.path / "package", copied)
    return copied


def test_a_copied_package_serves_and_predicts_as_the_run_does_without_torch(run, packaged, without_torch, tmp_path):
    paths = odd_images.write(tmp_path / "odd")
    expected = launcher.load(run.path).predict(paths.values())
    asked = [sys.executable, "-c", "import launcher, importlib.util as u; print(launcher.__file__); import torch"]
    found = subprocess.run(
        asked, cwd=packaged, env=os.environ | without_torch, capture_output=True, text=True, check=False
    )
    assert found.stdout.startswith(str(packaged))
    assert "there is no torch here" in found.stderr
    with serving("model.onnx", cwd=packaged, env=without_torch) as server:
        for path, one in zip(paths.values(), expected, strict=True):
            (row,) = server.ask("/predict", path.read_bytes()).json["predictions"]
            assert [top["class"] for top in row["top"]] == [name for name, _ in one.top]
            assert [top["probability"] for top in row["top"]] == pytest.approx([p for _, p in one.top], abs=1e-5)
        assert server.ask("/").code == 200
        assert server.stop() == 0
    command = [sys.executable, "-m", "launcher", "predict", "model.onnx", str(paths["plain.jpg"]), "--json"]
    said = json.loads(subprocess.check_output(command, cwd=packaged, env=os.environ | without_torch))
    assert [top["class"] for top in said["top"]] == [name for name, _ in expected[0].top]


def test_it_says_what_it_holds_and_how_it_is_run(run, packaged):
    facts = json.loads((packaged / "model.json").read_text())
    manifest = json.loads(run.export_manifest.read_text())
    assert facts["classes"] == manifest["classes"]
    assert facts["preprocessing"] == manifest["preprocessing"]
    assert facts["measured"] == manifest["exports"][0]
    requirements = (packaged / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z-]+[=>]=[0-9.a-z]+", line) for line in requirements)
    assert "torch" not in " ".join(requirements)
    docker = (packaged / "Dockerfile").read_text()
    assert '"serve", "model.onnx", "--host", "0.0.0.0"' in docker
    readme = (packaged / "README.md").read_text()
    assert "python -m launcher serve model.onnx" in readme
    assert "top-1" in readme
    assert not {"{", "}"} & set(readme)
    assert not any(path.name == "__pycache__" for path in (run.path / "package").rglob("*"))


def test_the_least_versions_are_those_of_the_project():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    floors = dict(line.split(">=") for line in named)
    assert {name: floors.get(name, floor) for name, floor in package.REQUIREMENTS.items()} == package.REQUIREMENTS
    assert {line.split(">=")[0] for line in project["optional-dependencies"]["serve"]} <= set(package.REQUIREMENTS)


def test_an_earlier_package_gives_way_and_other_folders_do_not(run, tmp_path, capsys):
    target = tmp_path / "mine"
    target.mkdir()
    assert cli.main(["package", str(run.path), "--to", str(target)]) == 0
    (target / "old").write_text("")
    assert cli.main(["package", str(run.path), "--to", str(target)]) == 0
    assert not (target / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for place in (other, other / "thesis.txt"):
        assert cli.main(["package", str(run.path), "--to", str(place)]) == 2
    assert "holds something else than a package" in capsys.readouterr().err
    assert (other / "thesis.txt").read_text() == "mine"


def test_the_fastest_that_passed_its_gate_is_taken_or_the_one_that_is_named(run, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run.path, copied, symlinks=True)
    manifest_file = copied / "exports" / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    (row,) = manifest["exports"]
    for name, faster, accepted in (("int8", 2.0, True), ("fp16", 3.0, False)):
        file = f"model.{name}.onnx"
        shutil.copy(copied / "exports" / "model.onnx", copied / "exports" / file)
        other = {"file": file, "format": name, "accepted": accepted}
        manifest["exports"].append(row | other | {"latency_p50_ms": row["latency_p50_ms"] / faster})
    manifest_file.write_text(json.dumps(manifest))
    assert cli.main(["package", str(copied)]) == 0
    assert (copied / "package" / "model.int8.onnx").exists()
    assert cli.main(["package", str(copied), "--format", "onnx"]) == 0
    assert [file.name for file in (copied / "package").glob("*.onnx")] == ["model.onnx"]
    capsys.readouterr()
    assert cli.main(["package", str(copied), "--format", "fp16"]) == 2
    assert "--format fp16: not among those that passed their gate: onnx, int8" in capsys.readouterr().err
    for one in manifest["exports"]:
        one["accepted"] = False
    manifest_file.write_text(json.dumps(manifest))
    assert cli.main(["package", str(copied)]) == 2
    assert "no ONNX file of its best checkpoint has passed its gate" in capsys.readouterr().err
