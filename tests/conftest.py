"""What all tests share: data under a cache of their own, and `launch` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep the digits out of the home folder; subprocesses inherit the variable."""
    before = os.environ.get("FINETUNE_LAUNCHER_CACHE")
    os.environ["FINETUNE_LAUNCHER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["FINETUNE_LAUNCHER_CACHE"]
    else:
        os.environ["FINETUNE_LAUNCHER_CACHE"] = before


@pytest.fixture
def launch(tmp_path):
    """Run `launch …` in an empty folder of its own and return the finished process."""
    folder = tmp_path / "cwd"
    folder.mkdir()

    def _launch(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **(env or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    _launch.cwd = folder
    return _launch
