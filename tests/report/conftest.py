"""A browser for pages, and what finds barriers in them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests import chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = chromium.Chromium(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """axe-core's source, by npm; skips where it cannot be had."""
    folder = tmp_path_factory.mktemp("axe")
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    command = ["npm", "install", "--no-save", "--silent", "axe-core@4"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("npm does not give axe-core")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()
