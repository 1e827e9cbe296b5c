"""One task of a SLURM job: which of the nodes this is, where they meet, and how the job ends.

submitit calls :func:`main` on every node with the run directory and nothing else; all it has to know is there. In an
allocation srun does, by ``python -m launcher.backends.slurm.task RUN``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.backends import living
from launcher.errors import (
    EXIT_OK,
    EXIT_PREFLIGHT,
    InterruptedRunError,
    PreflightError,
    TrainingError,
    exit_code_of,
)
from launcher.node import preflight, signals, supervisor
from launcher.plan import variables
from launcher.runs import history, states, user_code, whereabouts
from launcher.runs.run_dir import BATCH_LOG_VARIABLE, RunDir, code_digest, node_name
from launcher.system import network
from launcher.system.files import write_json_atomic, write_text_atomic
from launcher.system.waiting import is_listed, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

    from launcher.plan.launch_plan import LaunchPlan

LOOPBACK = "127.0.0.1"
MEET_TIMEOUT_S = 600
PREFLIGHT_PORT = 5000
"""How far its port is from that of the rendezvous."""
STEP_PORTS = 101
"""How far the ports of an allocation's steps are apart."""
STALE = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
STALE_BEGINNINGS = ("TORCHELASTIC_", "PET_", "ROLE_", "GROUP_")


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
                _wait_for(done, None, "node 0 to finish the run")
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


def _wait_for(file: Path, timeout_s: float | None, what: str) -> bool:
    """Wait until another node has made ``file``; False where it has not in time.

    Raises:
        InterruptedRunError: a stop signal came.
    """
    return wait_until(
        lambda: is_listed(file),
        timeout_s=timeout_s,
        heed=lambda: signals.heed(f"waiting for {what}"),
        what=what,
    )


def _tell_of_other_code(run: RunDir) -> None:
    """Say and write down that the launcher's code, or the originals of the user's own, are others by now."""
    planned = run.read_launched().code
    if code_digest() != planned:
        run.append_event("code_changed", planned=planned, found=code_digest())
        print("warning: the code of finetune-launcher has changed since this run was launched", file=sys.stderr)
    if manifest := user_code.read_manifest(run.code):
        user_code.tell_of_changes(run, user_code.find_changed(manifest))


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
        living.refuse_second_job(run, str(SlurmJobEnvironment().job_id))
        _tell_of_other_code(run)
        _tell_lost_variables(run)
        if run.read_status()["state"] in whereabouts.OVER:  # somebody has queued its job again (scontrol requeue)
            states.move(run, "pending")
        history.close_attempt(run, lost_nodes=_lost_nodes())
        stopped = history.refusal(run)
        if stopped:
            run.append_event("refused", message=stopped)
            states.move(run, "failed")
            raise TrainingError(f"{stopped}\nmore: launch why {run}")
    if plan.nodes > 1:
        hosts = SlurmJobEnvironment().hostnames
        # To itself a node's route is the loopback; to any other it is the network that they share.
        try:
            plan = _with_address(plan, toward=hosts[1 if node_rank == 0 else 0])
        except PreflightError as error:
            host = node_name()
            _leave_out(run, {host: str(error).removeprefix(f"{host}: ")}, node_rank=node_rank)
            raise
        met = _meet(run, node_rank, plan.address, first_host=hosts[0])
        plan, attempt = replace(plan, rdzv_endpoint=network.join(met["host"], met["port"])), met["attempt"]
    network.set_environment(plan.env)
    if plan.preflight:
        problems = _check_nodes(run, plan)
        if problems and node_rank == 0:
            _leave_out(run, problems, node_rank=node_rank)
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
        bad = [file.read_text(encoding="utf-8").strip() for file in run.all_bad_nodes(_start())]
        if node_rank or not bad:
            raise
        states.move(run, "pending")
        raise PreflightError(f"stopped because {', '.join(bad)} failed the check of its own network") from None


def _check_nodes(run: RunDir, plan: LaunchPlan) -> dict[str, str]:
    """What is wrong, by host. Raises InterruptedRunError where a stop signal came."""
    folder, seed = run.preflight(_start()), _seed() + PREFLIGHT_PORT
    try:
        return preflight.run(folder, plan, seed=seed, heed=_heed_check)
    except InterruptedRunError:
        if plan.node_rank == 0:
            whereabouts.note_preempted(run)
        raise


def _heed_check() -> None:
    signals.heed("checking the nodes")


def _leave_out(run: RunDir, problems: dict[str, str], *, node_rank: int) -> None:
    """Have the batch script queue the job again without its bad nodes, a few times; in an allocation there is none."""
    run.append_event("preflight_failed", problems=problems)
    bad = run.bad_nodes(_start(), node_rank)
    bad.parent.mkdir(exist_ok=True)
    write_text_atomic(bad, ",".join(problems) + "\n")


def check(folder: str) -> None:
    """Check this job's nodes and nothing else, for ``launch doctor --nodes``; node 0 leaves ``result.json``."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    scrub(os.environ)
    node_rank, hosts = int(os.environ["SLURM_NODEID"]), SlurmJobEnvironment().hostnames
    plan = replace(RunDir(folder).read_plan(), node_rank=node_rank, address=LOOPBACK)
    if len(hosts) > 1:
        plan = _with_address(plan, toward=hosts[1 if node_rank == 0 else 0])
    network.set_environment(plan.env)
    nodes = Path(folder) / "nodes"
    try:
        seed = int(os.environ["SLURM_JOB_ID"])
        problems = preflight.run(nodes, plan, seed=seed, heed=_heed_check)
    except PreflightError as error:
        problems = {"*": str(error)}
    if node_rank == 0:
        write_json_atomic(Path(folder) / "result.json", {"facts": preflight.read_facts(nodes), "problems": problems})


def _lost_nodes() -> list[str]:
    """Of which srun said in the job's earlier starts that they failed."""
    text = ""
    if log := os.environ.get(BATCH_LOG_VARIABLE):
        with contextlib.suppress(FileNotFoundError):  # a site's filter may have SLURM write it elsewhere
            text = Path(log).read_text(encoding="utf-8", errors="replace")
    return re.findall(r"^srun: error: Node failure on (\S+)$", text, re.MULTILINE)


def _tell_lost_variables(run: RunDir) -> None:
    """Say which of the submitting shell's variables have not come along, as by --export=NONE; once a start."""
    lost = [name for name in run.read_launched().variables if name not in os.environ]
    if lost:
        run.append_event("variables_lost", names=lost)
        print(
            f"warning: the job came without {', '.join(lost)} of the shell it was launched from (sbatch --export, by a "
            f"profile or a site); {variables.CURE}",
            flush=True,
        )


def scrub(environment: MutableMapping[str, str]) -> None:
    """Take out what an earlier launcher in the submitting shell left for its own workers."""
    for name in list(environment):
        if name in STALE or name.startswith(STALE_BEGINNINGS):
            del environment[name]


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
    if not _wait_for(file, MEET_TIMEOUT_S, f"node 0 ({first_host}) to say where the nodes meet"):
        raise PreflightError(
            f"{file}: not there after {MEET_TIMEOUT_S} s; {first_host} writes it: did it start, and is the folder on a "
            "file system that all nodes share?"
        )
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _with_address(plan: LaunchPlan, *, toward: str) -> LaunchPlan:
    """The plan with this node's address for the others; NCCL and gloo are told its interface."""
    wanted = plan.profile.interface if plan.profile else None
    try:
        address = network.address_of(wanted) if wanted else network.local_address(toward)
    except OSError as error:
        raise PreflightError(f"{node_name()}: there is no way to {toward}: {error}") from None
    if address is None or address.startswith("127."):
        raise PreflightError(
            f"{node_name()}: "
            + (f"has no interface {wanted} with an IPv4 address" if wanted else f"reaches {toward} by loopback only")
            + "; name the network in the profile: interface: ib0"
        )
    interface = wanted or network.interface_of(address)
    env = network.interface_environment(interface, address) if interface else {}
    return replace(plan, address=address, env=plan.env | env)


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1] == "--check" else main(sys.argv[1])
