"""How far it is from the command line to the training loop, in frames of our own, in real tracebacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FRAMES = 8

# The launching process and the worker each write down their stack at the first step that the loop asks for: the agent's
# thread forks the workers, so a worker's stack begins with that thread's. Where the main thread stands meanwhile it has
# started the agent's thread.
PROBE = """
import json, os, sys, threading, traceback
from pathlib import Path
from launcher import cli
from launcher.node import agent_thread

out = Path(sys.argv.pop(1))

def own(stack):
    names = [(frame.filename, frame.name) for frame in stack]
    ours = [(file, name) for file, name in names if "/launcher/" in file and "site-packages" not in file]
    return [f"{file.rpartition('/launcher/')[2]}:{name}" for file, name in ours]

begin = agent_thread.AgentThread.__init__

def init(self, *arguments):
    (out / "launching").write_text(json.dumps(own(traceback.extract_stack())))
    begin(self, *arguments)
    from launcher.engine.trainer import Trainer
    # Forked workers inherit it; the first thing that the loop calls.
    def first(self):
        (out / "worker").write_text(json.dumps(own(traceback.extract_stack()[:-1])))
        os._exit(1)
    Trainer._take_next = first

agent_thread.AgentThread.__init__ = init
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_loop_is_at_most_eight_of_our_frames_away(tmp_path):
    """From ``cli.main`` to what starts the agent's thread, that thread's own in what it forks, and those of a worker
    down to the loop, the one with the loop counted too."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", PROBE, str(tmp_path), str(ROOT / "recipes/debug.yaml"), "--run-dir", "run"),
            *("--backend", "torchrun", "--procs", "1", "launch.max_restarts=0", "post.enabled=false"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert (tmp_path / "worker").exists(), done.stderr
    launching, worker = (json.loads((tmp_path / name).read_text()) for name in ("launching", "worker"))
    assert launching[0] == "cli.py:main"
    assert worker[-1] == "engine/trainer.py:run"
    frames = [*launching, *worker]
    print("\n".join(frames))
    assert len(frames) <= MAX_FRAMES, frames
