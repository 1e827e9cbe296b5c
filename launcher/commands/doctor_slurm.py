"""Whether a SLURM cluster takes jobs from here, for ``launch doctor``: its commands, and its partitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.backends.slurm import client as slurm_client
from launcher.commands.doctor_checks import Verdict, ok, warning
from launcher.system.words import plural

if TYPE_CHECKING:
    from launcher.backends.slurm.admission import Cluster

MOST_SHOWN = 8
"""Partitions that are named."""


def check_slurm(version: str | None, error: str | None, *, has_srun: bool) -> Verdict:
    """Whether jobs can be submitted. ``error`` is what ``sbatch --version`` said when it failed."""
    if error is not None:
        return warning(f"sbatch fails: {error}", "load the cluster's slurm module again, or ask its administrators")
    if version is None:
        return ok("none here (no sbatch on PATH)")
    if not has_srun:
        return warning(f"{version}, without srun on PATH", "install the whole SLURM client")
    return ok(version)


def partitions(*, has_sbatch: bool) -> Verdict:
    """Ask the cluster for its partitions and their nodes."""
    from launcher.backends.slurm import admission

    if not has_sbatch:
        return ok("no cluster here")
    try:
        return check_partitions(admission.read_cluster())
    except slurm_client.SlurmError as error:
        cure = "`scontrol ping` says whether its controller answers; ask the cluster's administrators"
        return warning(" ".join(str(error).split()), cure)


def check_partitions(cluster: Cluster) -> Verdict:
    """Whether jobs would start: each partition with its nodes that are up, their GPUs and its time limit."""
    if not cluster.partitions:
        return warning("you see none", "ask the cluster's administrators for an account (sacctmgr show associations)")
    said, closed = [], []
    for name, fields in cluster.partitions.items():
        nodes = [node for node in cluster.nodes if node.partition == name]
        usable = [node for node in nodes if node.usable]
        gpus = {node.num_gpus(None) for node in usable}
        is_up = fields.get("State", "UP") == "UP"
        facts = [f"{len(usable)} of {plural(len(nodes), 'node')} up" if is_up else fields["State"].lower()]
        facts += [f"{'up to ' if len(gpus) > 1 else ''}{plural(max(gpus), 'GPU')} each"] if any(gpus) else []
        facts += [f"at most {fields['MaxTime']}"] if "MaxTime" in fields else []
        said.append(f"{name}{'*' if fields.get('Default') == 'YES' else ''} ({', '.join(facts)})")
        closed += [] if is_up and usable else [name]
    more = f" and {len(said) - MOST_SHOWN} more" if len(said) > MOST_SHOWN else ""
    found = ", ".join(said[:MOST_SHOWN]) + more
    if closed:
        where = "all of them" if len(closed) == len(said) else ", ".join(closed)
        return warning(
            found, f"no job starts in {where} now; `sinfo --list-reasons` says why, --profile chooses another"
        )
    return ok(f"{found}; * is the default; `launch init-profile` writes a profile of it")
