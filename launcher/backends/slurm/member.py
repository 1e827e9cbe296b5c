"""One node of a SLURM job that shrinks and grows: its supervisor is a step of its own, which survives the others.

The job's script (:mod:`launcher.plan.node_steps`) starts it, and again where it was killed from outside:
``python -m launcher.backends.slurm.member RUN --start START --node NODE``.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.backends.slurm import client as slurm_client
from launcher.backends.slurm import node_start
from launcher.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, InterruptedRunError, PreflightError, exit_code_of
from launcher.node import preflight, signals, supervisor
from launcher.runs import whereabouts
from launcher.runs.generations import Generations
from launcher.runs.run_dir import BATCH_LOG_VARIABLE, RunDir, node_name
from launcher.system import network
from launcher.system.files import write_json_atomic, write_text_atomic
from launcher.system.waiting import is_listed, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.plan.launch_plan import LaunchPlan

HEARD_S = 30
"""How long the batch script gets to take notice that the run has ended; it looks every second."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run this node's part of the job; return the design's exit code.

    It leaves a file that says that it has ended by itself: without one it was killed. The node that held rank 0 at the
    end speaks for the whole run, by another one.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="the run directory")
    parser.add_argument("--start", required=True, help="tells this start of the job from others")
    parser.add_argument("--node", type=int, required=True, help="which of the job's nodes this is, from 0")
    args = parser.parse_args(argv)
    signals.hold()
    run = RunDir(args.run_dir)
    run.slurm.mkdir(exist_ok=True)
    code = exit_code_of(lambda: _supervise(run, args.start, args.node))
    newest = Generations(run, args.start).newest()
    leads = newest.nodes[0] == args.node if newest else args.node == 0
    if leads or (code == EXIT_FAILED and run.read_status()["state"] == "failed"):
        number = newest.number if newest else 0
        write_text_atomic(run.job_done(f"{args.start}-{number:04d}"), f"{code}\n")
        _end_job_without_script(run, args.start, code)
    write_text_atomic(run.node_left(args.start, args.node), f"{code}\n")
    sys.stdout.flush()
    return code


def _end_job_without_script(run: RunDir, start: str, code: int) -> None:
    """Do what is left to the batch script where it was lost with the first node, which SLURM takes out of the job.

    The steps of the other nodes have gone on; the job itself would go on until its time limit.
    """
    if BATCH_LOG_VARIABLE not in os.environ:
        return
    from submitit.slurm.slurm import SlurmJobEnvironment

    job, heard = SlurmJobEnvironment(), run.node_left(start, "script")
    has_heard = wait_until(lambda: is_listed(heard), timeout_s=HEARD_S, heed=lambda: None)
    job_id = str(job.job_id)
    command = ("scontrol", "requeue", job_id) if code == EXIT_RESUMABLE else ("scancel", job_id)
    try:
        # Asked also where it has heard: a node that is cut off may, by the way of its files, but cannot tell SLURM.
        if not _is_gone(job_id, job.hostnames[0]):
            return
        print(f"the batch script was lost with its node, {job.hostnames[0]}: {' '.join(command)}", flush=True)
        slurm_client.run(*command)
    except slurm_client.SlurmError as error:  # as in a container
        if not has_heard:
            print(f"warning: {error}; job {job_id} goes on until its time limit", file=sys.stderr, flush=True)


def _is_gone(job_id: str, host: str) -> bool:
    """Whether SLURM has taken a node out of a job, or does not reach it."""
    nodes = slurm_client.job_states([job_id])[job_id].nodes
    if nodes and host not in slurm_client.run("scontrol", "show", "hostnames", nodes).split():
        return True
    states = slurm_client.run("sinfo", "--noheader", f"--nodes={host}", "--format=%T").split()
    return any("*" in state or state.startswith("down") for state in states)


def _supervise(run: RunDir, start: str, node: int) -> int:
    from submitit.slurm.slurm import SlurmJobEnvironment

    node_start.scrub(os.environ)
    hosts = SlurmJobEnvironment().hostnames
    plan = replace(
        run.read_plan(),
        run_dir=str(run.path),
        node_rank=node,
        rdzv_endpoint=f"{node_start.LOOPBACK}:0",
    )
    if not _has_begun(run, start, node, first_host=hosts[0]):
        return EXIT_OK  # node 0 speaks for the run
    # To itself a node's route is the loopback; to any other it is the network that they share.
    try:
        plan = node_start.with_address(plan, toward=hosts[1 if node == 0 else 0])
    except PreflightError as error:
        problems = {node_name(): str(error).removeprefix(f"{node_name()}: ")}
        node_start.leave_out(run, problems, start=start, node_rank=node)
        raise
    network.set_environment(plan.env)
    if plan.preflight:
        plan = _without_bad_nodes(run, plan, start, hosts)
    return supervisor.supervise(plan, start=start)


def _has_begun(run: RunDir, start: str, node: int, *, first_host: str) -> bool:
    """Whether the run goes on, by the first node's word; False where that one had to refuse it.

    Raises:
        PreflightError: the nodes share no file system.
        InterruptedRunError: a stop signal came.
    """
    file = run.meeting(start)
    if node == 0:
        if not is_listed(file):  # it is there where this supervisor was killed, and is started again
            node_start.begin(run)
            write_json_atomic(file, {"host": node_name()})
        return True
    refused = run.job_done(f"{start}-{0:04d}")
    node_start.wait_for_first(file, first_host, "to begin", or_until=lambda: is_listed(refused))
    return is_listed(file)


def _without_bad_nodes(run: RunDir, plan: LaunchPlan, start: str, hosts: Sequence[str]) -> LaunchPlan:
    """Check the nodes, spare ones too; return the plan with those that train first.

    Raises:
        PreflightError: this node is bad, or too few are good.
        InterruptedRunError: a stop signal came.
    """
    folder, node = run.preflight(start), plan.node_rank
    if (folder / f"node-{node}.json").exists():  # this supervisor was killed, and is started again
        return plan
    seed = int(os.environ["SLURM_JOB_ID"]) + node_start.PREFLIGHT_PORT
    try:
        problems = preflight.run(folder, replace(plan, nodes=plan.machines), seed=seed, heed=node_start.heed_check)
    except InterruptedRunError:
        if node == 0:
            whereabouts.note_preempted(run)
        raise
    if not problems:
        return plan
    if node == 0:
        node_start.leave_out(run, problems, start=start, node_rank=node)
    text = "; ".join(f"{host}: {problem}" for host, problem in problems.items())
    good = [number for number in range(plan.machines) if hosts[number] not in problems]
    if "*" in problems or len(good) < plan.fewest_nodes or node not in good:
        raise PreflightError(f"the check of the nodes failed: {text}")
    if node == 0:
        print(f"the check of the nodes failed; the run begins without these: {text}", flush=True)
    return replace(plan, members=tuple(good[: plan.nodes]))


if __name__ == "__main__":
    sys.exit(main())
