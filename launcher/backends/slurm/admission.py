"""Checks a SLURM job against the live cluster before it is submitted: could it start, and go on?"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.backends.slurm import client as slurm_client
from launcher.errors import PreflightError, did_you_mean
from launcher.plan import variables
from launcher.plan.profile import Profile
from launcher.runs import history

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from launcher.plan.launch_plan import LaunchPlan
    from launcher.runs.run_dir import RunDir

NEVER = ("UNLIMITED", "INFINITE", "NONE", "(null)")
GONE = ("down", "drain", "fail", "maint", "unk", "future", "power")
MARGIN = 2
"""A checkpoint must fit this many times into the time that the run gets to save."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node as sinfo shows it in one partition."""

    name: str
    """Host name."""
    partition: str
    """Its partition."""
    cpus: int
    """CPUs that SLURM gives out."""
    mem_mb: int
    """Memory that SLURM gives out."""
    gres: str
    """Generic resources, as in gpu:a100:8(S:0-1)."""
    features: tuple[str, ...]
    """For constraints."""
    state: str
    """idle, mixed, down* and so on."""

    def num_gpus(self, kind: str | None) -> int:
        """GPUs, or those of a kind (``gpu:a100``)."""
        wanted = (kind or "gpu").split(":")
        total = 0
        for item in re.sub(r"\([^)]*\)", "", self.gres).split(","):
            parts = item.split(":")
            if parts[: len(wanted)] == wanted and parts[-1].isdigit():
                total += int(parts[-1])
        return total

    @property
    def usable(self) -> bool:
        """Whether jobs can start there sooner or later."""
        return not self.state.lower().startswith(GONE) and "*" not in self.state


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Facts about the cluster."""

    partitions: Mapping[str, Mapping[str, str]]
    """``scontrol show partition``: name to fields."""
    nodes: Sequence[Node]
    """``sinfo``: one for each node in each partition."""
    requeues: bool = True
    """Whether its jobs are queued again where they do not ask for it (JobRequeue)."""


def check(plan: LaunchPlan, run: RunDir, *scripts: str) -> None:
    """Ask the cluster whether the plan's job can run there; doubts are printed.

    Args:
        plan: the run's.
        run: the run directory, which need not be there.
        scripts: what is to be submitted.

    Raises:
        PreflightError: it cannot; names everything that is in the way. Or there is no cluster that answers.
    """
    seconds = [event["seconds"] for event in history.events(run, "checkpoint")]
    try:
        cluster = read_cluster()
    except slurm_client.SlurmError as error:
        raise PreflightError(f"{error}; nothing was submitted") from None
    doubts = find_doubts(cluster, plan, checkpoint_s=max(seconds, default=None))
    for text in (*variables.notes(os.environ, _profile(plan)), *doubts):
        print(f"warning: {text}", file=sys.stderr, flush=True)
    problems = list(find_problems(cluster, plan)) or list(_refusals(scripts))
    if problems:
        head = "this cluster cannot run the job; nothing was submitted"
        raise PreflightError("\n".join([head, *(f"  {text}" for text in problems)]))


def check_step(plan: LaunchPlan) -> None:
    """The same inside an allocation, which has what it has: srun would wait for more, or refuse it in its own words.

    Raises:
        PreflightError: it is too small; says in what, all at once.
    """
    job_id, workers = os.environ.get("SLURM_JOB_ID"), plan.procs_per_node
    nodes = plan.machines
    has = f"the allocation {job_id} holds"
    held = int(os.environ.get("SLURM_JOB_NUM_NODES", nodes))
    cpus = sorted(_cpus_per_node(os.environ.get("SLURM_JOB_CPUS_PER_NODE", "")), reverse=True)[:nodes]
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    wanted = _profile(plan).cpus_per_gpu * workers
    problems = []
    if nodes > held:
        asked = f"--nodes {plan.nodes}" + (f" --spares {plan.spares}" if plan.spares else "")
        fewer = f"--nodes {held}" if held <= plan.nodes else f"--spares {held - plan.nodes}"
        problems.append(f"{asked}: {has} {held}; ask for more (salloc --nodes={nodes}) or give {fewer}")
    if cpus and wanted > cpus[-1]:
        fits = cpus[-1] // workers
        problems.append(
            f"{wanted} CPUs per node (cpus_per_gpu x workers: {wanted // workers} x {workers}): {has} {cpus[-1]}; ask "
            f"for more (salloc --cpus-per-task={wanted}) or give "
            + (f"a profile with cpus_per_gpu: {fits}" if fits else f"at most {cpus[-1]} workers and cpus_per_gpu: 1")
        )
    if plan.device == "cuda" and gpus.isdigit() and workers > int(gpus):
        more = f"salloc --gpus-per-node={workers}"
        problems.append(f"--gpus {workers}: {has} {gpus} per node; ask for more ({more}) or give --gpus {gpus}")
    if problems:
        raise PreflightError("\n".join([*problems, "nothing was started"]))


def _profile(plan: LaunchPlan) -> Profile:
    return plan.profile or Profile()


def _cpus_per_node(text: str) -> list[int]:
    """SLURM's ``8(x2),4`` as one number a node; nothing where it does not say."""
    return [int(cpus) for cpus, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def _refusals(scripts: Sequence[str]) -> Iterator[str]:
    """What sbatch itself refuses about the scripts (--test-only)."""
    for script in filter(None, scripts):
        try:
            slurm_client.run("sbatch", "--test-only", stdin=script)
        except slurm_client.SlurmError as error:
            yield " ".join(str(error).split())


def read_cluster() -> Cluster:
    """Ask scontrol and sinfo.

    Raises:
        SlurmError: they do not answer.
    """
    partitions = {}
    for line in slurm_client.run("scontrol", "show", "partition", "--oneliner").splitlines():
        fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
        partitions[fields["PartitionName"]] = fields
    nodes = []
    for line in slurm_client.run("sinfo", "--noheader", "--Node", "--format=%N|%P|%c|%m|%G|%f|%T").splitlines():
        name, partition, cpus, memory, gres, features, state = line.strip().split("|")
        nodes.append(
            Node(
                name=name,
                partition=partition.rstrip("*"),
                cpus=int(cpus),
                mem_mb=int(memory.rstrip("+")),
                gres=gres,
                features=tuple(features.split(",")),
                state=state,
            )
        )
    config = slurm_client.run("scontrol", "show", "config")
    return Cluster(
        partitions=partitions, nodes=nodes, requeues=not re.search(r"^JobRequeue\s*= 0$", config, re.MULTILINE)
    )


def find_problems(cluster: Cluster, plan: LaunchPlan) -> Iterator[str]:
    """What keeps the job from ever starting."""
    profile = _profile(plan)
    chosen = _partitions(cluster, profile)
    unknown = [name for name in chosen if name not in cluster.partitions]
    for name in unknown:
        hint = did_you_mean(name, cluster.partitions)
        valid = f"valid: {', '.join(cluster.partitions)}"
        yield " ".join(filter(None, [f"partition {name}: there is none of that name;", hint, valid]))
    if profile.lead_s >= profile.timeout_min * 60:
        yield f"lead_s is {profile.lead_s} s, as long as the whole time limit of {profile.timeout_min} min"
    if unknown or not chosen:
        return
    limits = {name: minutes(cluster.partitions[name]["MaxTime"]) for name in chosen}
    if all(limit is not None and profile.timeout_min > limit for limit in limits.values()):
        allowed = ", ".join(f"{name} {limit} min" for name, limit in limits.items())
        yield f"timeout_min is {profile.timeout_min}, more than is allowed ({allowed})"
    downs = [name for name in chosen if cluster.partitions[name]["State"] != "UP"]
    if len(downs) == len(chosen):
        yield f"partition {', '.join(downs)} is {cluster.partitions[downs[0]]['State']}"
    yield from _nodes(cluster, plan, chosen)


def find_doubts(cluster: Cluster, plan: LaunchPlan, *, checkpoint_s: float | None) -> Iterator[str]:
    """What may go wrong later. ``checkpoint_s``: the longest that a checkpoint of this run has taken."""
    profile = _profile(plan)
    if checkpoint_s is not None and checkpoint_s * MARGIN > profile.lead_s:
        yield f"lead_s is {profile.lead_s} s, and a checkpoint of this run has taken {checkpoint_s:.1f} s; raise it"
    exported, names = profile.sbatch.get("export", "ALL"), variables.read_by_runs(os.environ)
    if "ALL" not in str(exported).split(",") and names:
        kept = f"keeps what is set here from the job: {', '.join(names)}"
        yield f"sbatch.export: {exported} in the profile {kept}; {variables.CURE}"
    if not cluster.requeues:
        yield (
            "this cluster queues no job again that does not ask for it (JobRequeue=0); this one asks (--requeue), but "
            "where a submit filter refuses it, the run ends at its first cut: launch resume RUN"
        )
    for name in _partitions(cluster, profile):
        fields = cluster.partitions.get(name, {})
        if fields.get("PreemptMode") in ("CANCEL", "SUSPEND"):
            yield f"partition {name} answers preemption by {fields['PreemptMode']}, not by REQUEUE"
        grace = fields.get("GraceTime", "0")
        if checkpoint_s and fields.get("PreemptMode") == "REQUEUE" and int(grace) < checkpoint_s * MARGIN:
            took = f"a checkpoint of this run took {checkpoint_s:.1f} s"
            yield f"partition {name} gives a preempted job {grace} s; {took}"


def _partitions(cluster: Cluster, profile: Profile) -> list[str]:
    if profile.partition:
        return [part.strip() for part in profile.partition.split(",")]
    return [name for name, fields in cluster.partitions.items() if fields.get("Default") == "YES"]


def _nodes(cluster: Cluster, plan: LaunchPlan, chosen: Sequence[str]) -> Iterator[str]:
    """Whether enough nodes have what is asked for."""
    fitting = [node for node in cluster.nodes if node.partition in chosen]
    fitting = list({node.name: node for node in fitting}.values())
    total, wanted = len(fitting), plan.machines
    asked = f"{wanted} node{'s' if wanted > 1 else ''}"
    where = ", ".join(chosen)
    for what, has in _needs(plan):
        left = [node for node in fitting if has(node)]
        if len(left) < wanted:
            yield f"{asked} with {what} asked for, {where} has {len(left)} of {total}"
            return
        fitting = left
    up = [node for node in fitting if node.usable]
    if len(up) < wanted:
        states = ", ".join(f"{node.name} {node.state}" for node in fitting if not node.usable)
        yield f"{asked} asked for, {len(up)} that fit in {where} are up ({states})"


def _needs(plan: LaunchPlan) -> Iterator[tuple[str, Callable[[Node], bool]]]:
    """What each node must have, in words and as a test."""
    profile, workers = _profile(plan), plan.procs_per_node
    cpus, mem_mb, kind = profile.cpus_per_gpu * workers, round((profile.mem_gb or 0) * 1024), profile.gres
    constraint = profile.constraint or ""
    if plan.device == "cuda":
        yield f"{workers} GPUs{f' ({kind})' if kind else ''}", lambda node: node.num_gpus(kind) >= workers
    yield f"{cpus} CPUs (cpus_per_gpu x workers)", lambda node: node.cpus >= cpus
    yield f"{mem_mb} MB of memory", lambda node: node.mem_mb >= mem_mb
    if re.fullmatch(r"[\w.-]+", constraint):  # an expression SLURM itself must judge
        yield f"the feature {constraint}", lambda node: constraint in node.features


def minutes(text: str) -> int | None:
    """SLURM's D-HH:MM:SS in minutes; None for no limit."""
    if text in NEVER:
        return None
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes = (parts[0], parts[1]) if len(parts) == 3 else (0, parts[0])  # noqa: PLR2004  HH:MM:SS
    return int(days or 0) * 24 * 60 + hours * 60 + minutes
