"""What a node of a SLURM job does before its supervisor starts, however the job starts its nodes."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends import living
from launcher.errors import PreflightError, TrainingError
from launcher.node import signals
from launcher.plan import variables
from launcher.runs import history, states, user_code, whereabouts
from launcher.runs.identity import code_digest
from launcher.runs.run_dir import BATCH_LOG_VARIABLE, RunDir, node_name
from launcher.system import network
from launcher.system.files import write_text_atomic
from launcher.system.waiting import is_listed, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from launcher.plan.launch_plan import LaunchPlan

LOOPBACK = "127.0.0.1"
MEET_TIMEOUT_S = 600
PREFLIGHT_PORT = 5000
"""How far its port is from that of the rendezvous."""
STALE = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
STALE_BEGINNINGS = ("TORCHELASTIC_", "PET_", "ROLE_", "GROUP_")


def begin(run: RunDir) -> None:
    """Prepare the run for a start of its job, before any worker: for the first node to do.

    Raises:
        LaunchError: the run must not be carried out now.
    """
    from submitit.slurm.slurm import SlurmJobEnvironment

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


def _tell_of_other_code(run: RunDir) -> None:
    """Say and write down that the launcher's code, or the originals of the user's own, are others by now."""
    planned = run.read_launched().code
    if code_digest() != planned:
        run.append_event("code_changed", planned=planned, found=code_digest())
        print("warning: the code of finetune-launcher has changed since this run was launched", file=sys.stderr)
    if manifest := user_code.read_manifest(run.code):
        user_code.tell_of_changes(run, user_code.find_changed(manifest))


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


def wait_for(file: Path, timeout_s: float | None, what: str, *, or_until: Callable[[], bool] = lambda: False) -> bool:
    """Wait until another node has made ``file``; False where it has not in time.

    Raises:
        InterruptedRunError: a stop signal came.
    """
    return wait_until(
        lambda: is_listed(file) or or_until(),
        timeout_s=timeout_s,
        heed=lambda: signals.heed(f"waiting for {what}"),
        what=what,
    )


def wait_for_first(file: Path, host: str, what: str, *, or_until: Callable[[], bool] = lambda: False) -> None:
    """Wait until the first node has made what the others begin with.

    Raises:
        PreflightError: the nodes share no file system.
        InterruptedRunError: a stop signal came.
    """
    if not wait_for(file, MEET_TIMEOUT_S, f"node 0 ({host}) {what}", or_until=or_until):
        raise PreflightError(
            f"{file}: not there after {MEET_TIMEOUT_S} s; {host} writes it: did it start, and is the folder on a file "
            "system that all nodes share?"
        )


def heed_check() -> None:
    """Leave off the check of the nodes where a stop signal came."""
    signals.heed("checking the nodes")


def leave_out(run: RunDir, problems: dict[str, str], *, start: str, node_rank: int) -> None:
    """Have the batch script queue the job again without its bad nodes, a few times; in an allocation there is none."""
    run.append_event("preflight_failed", problems=problems)
    bad = run.bad_nodes(start, node_rank)
    bad.parent.mkdir(exist_ok=True)
    write_text_atomic(bad, ",".join(problems) + "\n")


def scrub(environment: MutableMapping[str, str]) -> None:
    """Take out what an earlier launcher in the submitting shell left for its own workers."""
    for name in list(environment):
        if name in STALE or name.startswith(STALE_BEGINNINGS):
            del environment[name]


def with_address(plan: LaunchPlan, *, toward: str) -> LaunchPlan:
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
