"""``python -m launcher.node.all_reduce_here [--gpus N]``: the preflight's all-reduce on this machine alone.

Its last line is ``{ok, all_gb_s, within_gb_s, seconds}``; what stands in its way is on
standard error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import EXIT_FAILED, EXIT_OK
from launcher.node import all_reduce_round
from launcher.plan import plan as plans
from launcher.plan.launch_plan import LaunchPlan
from launcher.system import network
from launcher.system.processes import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Try it, and print how fast it goes; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher.node.all_reduce_here", description=__doc__)
    parser.add_argument("--gpus", type=int, default=0, help="so many, by NCCL (default: the CPU, by gloo)")
    gpus = parser.parse_args(argv).gpus
    die_with_parent()
    found = measure(gpus)
    if not found["ok"]:
        if found["seconds"] >= TIMEOUT_S:
            print(f"not all processes have answered within {TIMEOUT_S:.0f} s", file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(found))
    return EXIT_OK


def measure(gpus: int) -> dict[str, Any]:
    """What a node answers in a round of the preflight in which it is alone (:mod:`launcher.node.all_reduce_round`)."""
    plan = LaunchPlan(
        run_id="doctor",
        name="doctor",
        run_dir="",
        backend="torchrun",
        device="cuda" if gpus else "cpu",
        nodes=1,
        procs_per_node=gpus or all_reduce_round.MOST_ON_CPU,
        threads_per_proc=1,
    )
    network.set_environment(plans.environment(plan))
    with tempfile.TemporaryDirectory(prefix="launch-doctor-") as folder:
        place, endpoint = Path(folder), f"127.0.0.1:{network.free_port(os.getpid())}"
        all_reduce_round.take_part(place, 0, [[0]], [endpoint], plan, timeout_s=TIMEOUT_S, heed=lambda: None)
        found: dict[str, Any] = json.loads(all_reduce_round.answer_of(place, 0, 0).read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(main())
