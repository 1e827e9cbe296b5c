"""One task of a SLURM job: which of the nodes this is, where they meet, and how the job ends.

submitit calls :func:`main` on every node with the run directory and nothing else; all it has to know is there. In an
allocation srun does, by ``python -m launcher.backends.slurm.task RUN``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.backends.slurm import node_start
from launcher.backends.slurm.node_start import LOOPBACK, begin, heed_check, leave_out, scrub, wait_for, with_address
from launcher.errors import (
    EXIT_OK,
    EXIT_PREFLIGHT,
    InterruptedRunError,
    PreflightError,
    exit_code_of,
)
from launcher.node import preflight, signals, supervisor
from launcher.runs import history, states, whereabouts
from launcher.runs.run_dir import RunDir, node_name
from launcher.system import network
from launcher.system.files import write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.plan.launch_plan import LaunchPlan

STEP_PORTS = 101
"""How far the ports of an allocation's steps are apart."""


def main(run_path: str) -> None:
    """Run this node's part of the job; leaves by SystemExit with the design's exit code where that is not 0.

    Node 0 speaks for the run. The others leave with 0: srun ends the whole step when a task leaves with anything else,
    and five minutes after the first has left (``--wait``). So they stay until an orderly end, exports and all, is done.
    They leave at once where they were stopped: a node that is still there ten seconds after a SIGTERM is sent it again
    a minute later by slurmctld, and by then the step of that number is the requeued job's (SLURM 22.05). Where a node's
    own check has failed the step is meant to end: the others could wait for it long.
    """
    signals.hold()
    run = RunDir(run_path)
    code = exit_code_of(lambda: _supervise(run))
    done = run.job_done(_start())
    if os.environ["SLURM_NODEID"] == "0":
        done.parent.mkdir(exist_ok=True)
        write_text_atomic(done, f"{code}\n")  # for the batch script too: srun's own code may be that of a task it ended
    elif code != EXIT_PREFLIGHT:
        if code == EXIT_OK:
            with contextlib.suppress(InterruptedRunError):  # node 0 is told the same, and speaks for the run
                wait_for(done, None, "node 0 to finish the run")
        code = EXIT_OK
    sys.stdout.flush()
    if code:
        sys.exit(code)


def _start() -> str:
    """Which start of which job this is; a requeued job has another, and so has another step of an allocation."""
    return "-".join(
        [os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ["SLURM_STEP_ID"]]
    )


def _seed() -> int:
    """For a port: steps of one allocation have each its own, and so have jobs that follow each other."""
    return int(os.environ["SLURM_JOB_ID"]) + STEP_PORTS * int(os.environ["SLURM_STEP_ID"])


def _supervise(run: RunDir) -> int:
    from submitit.slurm.slurm import SlurmJobEnvironment

    scrub(os.environ)
    node_rank = int(os.environ["SLURM_NODEID"])
    plan = replace(
        run.read_plan(),
        run_dir=str(run.path),
        node_rank=node_rank,
        address=LOOPBACK,
        rdzv_endpoint=f"{LOOPBACK}:0",
    )
    attempt = None
    if node_rank == 0:
        begin(run)
    if plan.nodes > 1:
        hosts = SlurmJobEnvironment().hostnames
        # To itself a node's route is the loopback; to any other it is the network that they share.
        try:
            plan = with_address(plan, toward=hosts[1 if node_rank == 0 else 0])
        except PreflightError as error:
            host = node_name()
            leave_out(run, {host: str(error).removeprefix(f"{host}: ")}, start=_start(), node_rank=node_rank)
            raise
        met = _meet(run, node_rank, plan.address, first_host=hosts[0])
        plan, attempt = replace(plan, rdzv_endpoint=network.join(met["host"], met["port"])), met["attempt"]
    network.set_environment(plan.env)
    if plan.preflight:
        problems = _check_nodes(run, plan)
        if problems and node_rank == 0:
            leave_out(run, problems, start=_start(), node_rank=node_rank)
            text = "; ".join(f"{host}: {problem}" for host, problem in problems.items())
            raise PreflightError(f"the check of the nodes failed: {text}")
        if problems:
            return EXIT_OK  # node 0 speaks for the run
    with _preemption_told_from_bad_nodes(run, plan.node_rank):
        return supervisor.supervise(plan, first_attempt=attempt)


@contextlib.contextmanager
def _preemption_told_from_bad_nodes(run: RunDir, node_rank: int) -> Iterator[None]:
    """SLURM ends this node also where another one has failed its own check.

    Then the batch script queues the job again without that node, or ends it.
    """
    try:
        yield
    except InterruptedRunError:
        bad = [file.read_text(encoding="utf-8").strip() for file in run.slurm.glob(run.bad_nodes(_start(), "*").name)]
        if node_rank or not bad:
            raise
        states.move(run, "pending")
        raise PreflightError(f"stopped because {', '.join(bad)} failed the check of its own network") from None


def _check_nodes(run: RunDir, plan: LaunchPlan) -> dict[str, str]:
    """What is wrong, by host. Raises InterruptedRunError where a stop signal came."""
    folder, seed = run.preflight(_start()), _seed() + node_start.PREFLIGHT_PORT
    try:
        return preflight.run(folder, plan, seed=seed, heed=heed_check)
    except InterruptedRunError:
        if plan.node_rank == 0:
            whereabouts.note_preempted(run)
        raise


def check(folder: str) -> None:
    """Check this job's nodes and nothing else, for ``launch doctor --nodes``; node 0 leaves ``result.json``."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    scrub(os.environ)
    node_rank, hosts = int(os.environ["SLURM_NODEID"]), SlurmJobEnvironment().hostnames
    plan = replace(RunDir(folder).read_plan(), node_rank=node_rank, address=LOOPBACK)
    if len(hosts) > 1:
        plan = with_address(plan, toward=hosts[1 if node_rank == 0 else 0])
    network.set_environment(plan.env)
    nodes = Path(folder) / "nodes"
    try:
        seed = int(os.environ["SLURM_JOB_ID"])
        problems = preflight.run(nodes, plan, seed=seed, heed=heed_check)
    except PreflightError as error:
        problems = {"*": str(error)}
    if node_rank == 0:
        write_json_atomic(Path(folder) / "result.json", {"facts": preflight.read_facts(nodes), "problems": problems})


def _meet(run: RunDir, node_rank: int, address: str, *, first_host: str) -> dict[str, Any]:
    """Where the nodes of this start of the job meet: node 0 writes it, the others wait for it.

    Raises:
        PreflightError: the nodes share no file system.
    """
    file = run.meeting(_start())
    file.parent.mkdir(exist_ok=True)
    if node_rank == 0:
        port = network.free_port(_seed())
        met = {"host": address, "port": port, "attempt": history.next_attempt(run)}
        write_json_atomic(file, met)
        return met
    node_start.wait_for_first(file, first_host, "to say where the nodes meet")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1] == "--check" else main(sys.argv[1])
