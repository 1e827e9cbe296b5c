from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_every_file_of_the_package_and_of_its_linked_folders(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("launcher/")}
    folders = {"launcher": ROOT / "launcher", "launcher/tools": ROOT / "tools", "launcher/recipes": ROOT / "recipes"}
    folders["launcher/profiles"] = ROOT / "slurm" / "profiles"
    expected = {
        f"{name}/{path.relative_to(folder)}"
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == expected
    assert {"launcher/report/templates/report.html.jinja", "launcher/report/templates/style.css"} <= packed
