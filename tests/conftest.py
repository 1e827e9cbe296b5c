"""What all tests share: caches away from the home folder, a tiny image folder, and `launch` in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]
CLASSES = ("cat", "dog", "fox")
LAUNCH_ENDS_S = 120  # far more than anything takes: a command that hangs must not hold the tests up

# A test's own time on a busy machine says nothing about the code.
hypothesis.settings.register_profile("launcher", deadline=None)
hypothesis.settings.load_profile("launcher")


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Digits and weights in a folder of this session, for this process and those it starts."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_LAUNCHER_CACHE", str(folder / "finetune-launcher"))
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        yield folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An image folder: three classes, each with 6 training and 2 validation PNGs of noise, 40 x 36 px. Only to read."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, num in (("train", 6), ("val", 2)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for index in range(num):
                pixels = rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture
def recipe_file(tmp_path):
    """Write a recipe file, outside the folder that `launch` is run in; return its path."""

    def write(text, name="recipe.yaml"):
        path = tmp_path / "recipes" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def cwd(tmp_path):
    """The folder that `launch` is run in: empty."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    return folder


@pytest.fixture
def launch(cwd):
    """Run `python -m launcher …` on this machine's CPU; return its exit code and what it printed."""

    def run(*arguments, **environment):
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=LAUNCH_ENDS_S,
        )
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)

    return run
