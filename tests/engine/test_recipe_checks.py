from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import os, sys, torch
from launcher.engine import recipe_checks
from launcher.recipe import load

torch.set_num_threads(2)
model = {"arch": "squeezenet1_1", "weights": None}
recipe = load.from_dict({"name": "a", "model": model, "data": {"path": sys.argv[1], "image_size": 32}})
recipe_checks.check(recipe, str)
assert torch.get_num_threads() == 2
child = os.fork()
if not child:
    torch.ones(1 << 22).isfinite().all().item()
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


def test_a_process_that_has_checked_a_recipe_can_fork_others_that_compute(photos):
    """The supervisor forks the exports. OpenMP's threads do not survive that: a child would wait for them for ever."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(photos)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2"},
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
