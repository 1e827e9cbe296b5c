from __future__ import annotations

import pytest

from launcher import cli


@pytest.fixture
def dry_run(recipe_file, capsys):
    """Exit code and what is printed of `launch RECIPE key=value … --dry-run`."""
    recipe = recipe_file("model: {arch: shufflenet_v2_x0_5, weights: null}\nlaunch: {device: cpu}\n")

    def run(*overrides):
        code = cli.main([str(recipe), *overrides, "--dry-run"])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run
