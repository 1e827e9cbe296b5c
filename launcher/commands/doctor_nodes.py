"""``launch doctor --nodes N``: the same check of a cluster's nodes that ``launch.preflight`` makes before training."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.backends.slurm import client as slurm_client
from launcher.errors import EXIT_OK, EXIT_PREFLIGHT, PreflightError, UsageError
from launcher.plan import batch_script, topology, variables
from launcher.plan import plan as plans
from launcher.plan import profile as profiles
from launcher.plan.launch_plan import Launched, LaunchPlan
from launcher.runs.run_dir import RunDir

COLUMNS = (
    *("host", "address", "torch", "cuda", "nccl", "driver", "num_gpus", "free_gb"),
    *("within_gb_s", "between_gb_s"),
)
ROUNDED = {"free_gb": 0, "within_gb_s": 1, "between_gb_s": 1}
"""Columns that are shown with so many decimals."""


def run(nodes: int, *, gpus: int | None, profile_name: str | None, as_json: bool) -> int:
    """Check some nodes by a job of their own; print what each has, and which is bad.

    Args:
        nodes: how many.
        gpus: that each must have; None: the network only, on the CPU.
        profile_name: of the cluster.
        as_json: ``{facts, problems}`` instead of a table.

    Returns:
        0, or 3 where a node or the network between them is bad.

    Raises:
        UsageError: ``nodes`` is below 1.
        PreflightError: the job gave no result.
    """
    if nodes < 1:
        raise UsageError(f"--nodes {nodes}: at least 1")
    here = topology.detect()
    profile = profiles.load(profile_name) if profile_name else profiles.Profile()
    profile = variables.fill(profile, here.sbatch_variables)
    # Below runs/, as a run would be: whether the nodes share that is one of the questions.
    folder = Path(here.cwd, "runs", f"doctor-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    job = batch_script.Job(
        name="launch-doctor",
        run_dir=str(folder),
        nodes=nodes,
        procs_per_node=gpus or 1,
        device="cuda" if gpus else "cpu",
        python=here.python,
    )
    plan = LaunchPlan(
        run_id=folder.name,
        name=job.name,
        run_dir=job.run_dir,
        backend="slurm",
        device="cuda" if gpus else "cpu",
        nodes=nodes,
        procs_per_node=job.procs_per_node,
        threads_per_proc=profile.cpus_per_gpu,
        profile=profile,
    )
    plan = replace(plan, env=plans.environment(plan))
    folder.mkdir(parents=True)
    try:
        RunDir(folder).write_plan(plan, Launched())
        found = _ask(batch_script.check_command(job, profile), folder, profile.env)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return EXIT_PREFLIGHT if found["problems"] else EXIT_OK


def _ask(command: tuple[str, ...], folder: Path, env: dict[str, str]) -> dict[str, Any]:
    environment = slurm_client.clean_environment() | env
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PreflightError("srun: not found; SLURM's commands are on PATH where jobs are submitted") from None
    result = folder / "result.json"
    if not result.exists():
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-10:])
        raise PreflightError(f"the nodes gave no result (srun ended with {done.returncode}):\n{said}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def _print(found: dict[str, Any]) -> None:
    rows = [tuple(name for name in COLUMNS)]
    for facts in found["facts"]:
        values = [facts[name] for name in COLUMNS]
        rows.append(tuple(map(_cell, COLUMNS, values)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for facts in found["facts"]:
        if facts["slow"]:
            print(f"slow: {facts['host']}: {facts['slow']}")
    for host, problem in found["problems"].items():
        print(f"problem: {host}: {problem}" if host != "*" else f"problem: {problem}")
    if not found["problems"]:
        print(f"ok: an all-reduce over {len(found['facts'])} nodes works")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.{ROUNDED[name]}f}" if name in ROUNDED else str(value)
