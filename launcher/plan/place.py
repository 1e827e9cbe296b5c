"""Where a run goes: its device, workers, threads and endpoint, and the command or the script that starts it there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError
from launcher.plan import batch_script, variables

if TYPE_CHECKING:
    from launcher.plan.launch_plan import DeviceType
    from launcher.plan.profile import Profile
    from launcher.plan.request import Request
    from launcher.plan.topology import Topology
    from launcher.recipe.schema import LaunchConfig, Recipe

MAX_PORT = 65_535
_ENDPOINT = re.compile(r"(?:[^\s:/\[\]]+|\[[0-9A-Fa-f:.]+\]):0*[1-9][0-9]*")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run goes, and what is started there."""

    device: DeviceType
    procs: int
    run_dir: str
    threads: int
    """Of each worker."""
    said_threads: int
    """What the environment or the profile says of them; 0: nothing."""
    endpoint: str = ""
    command: tuple[str, ...] = ()
    profile: Profile | None = None
    script: str = ""
    post_script: str = ""


def as_job(
    recipe: Recipe, topology: Topology, request: Request, profile: Profile, post_profile: Profile | None
) -> Place:
    """A SLURM job, or a step of the allocation that this is."""
    if not topology.allocation:
        profile = variables.fill(profile, topology.sbatch_variables)
        post_profile = variables.fill(post_profile, topology.sbatch_variables) if post_profile else None
    device, procs = _choose_for_job(recipe)
    run_dir = str(Path(topology.cwd, _run_dir(request)))
    if any(char in "%\\" or not char.isprintable() for char in run_dir):
        raise UsageError(
            f"--run-dir {run_dir}: SLURM puts something else in the place of a %, a backslash or a control "
            "character; name another folder"
        )
    job = batch_script.Job(
        name=recipe.name,
        run_dir=run_dir,
        nodes=recipe.launch.max_nodes + recipe.launch.spares,
        is_elastic=bool(recipe.launch.min_nodes or recipe.launch.spares),
        procs_per_node=procs,
        device=device,
        python=topology.python,
    )
    command: tuple[str, ...] = ()
    script = post_script = ""
    if topology.allocation:
        command = batch_script.step_command(job, profile, overlap=topology.in_step)
    else:
        script = batch_script.build_script(job, profile)
        if post_profile and recipe.post.enabled:
            post_script = batch_script.build_post_script(job, post_profile)
    said = _said_threads_of_job(profile, topology)
    return Place(
        device=device,
        procs=procs,
        run_dir=run_dir,
        threads=said or profile.cpus_per_gpu,
        said_threads=said or 0,
        command=command,
        profile=profile,
        script=script,
        post_script=post_script,
    )


def here(recipe: Recipe, topology: Topology, request: Request) -> Place:
    """This machine, or one of several that are started by hand."""
    device = _choose_device(recipe, topology)
    procs = _choose_procs(recipe, topology, device)
    launch, run_dir = recipe.launch, _run_dir(request)
    nodes = launch.max_nodes
    endpoint, said = _choose_endpoint(launch, request), topology.omp_num_threads or 0
    command: tuple[str, ...] = ("python", "-m", "launcher.node", run_dir, "--node-rank", str(request.node_rank))
    if nodes > 1:
        command += ("--nodes", str(nodes), "--procs", str(procs), "--rdzv-endpoint", endpoint)
    return Place(
        device=device,
        procs=procs,
        run_dir=run_dir,
        threads=said or max(1, topology.num_cores // procs),
        said_threads=said,
        endpoint=endpoint,
        command=command,
    )


def _run_dir(request: Request) -> str:
    return request.run_dir or str(Path("runs") / request.run_id)


def choose_backend(recipe: Recipe, topology: Topology, request: Request) -> str:
    """``local``, ``torchrun`` or ``slurm``.

    Raises:
        UsageError: the command line does not go with it.
    """
    backend = _backend_of(recipe, topology, request)
    if request.detach and backend == "local":
        raise UsageError("--detach: --debug and launch.backend=local are for a terminal; leave one of them out")
    return backend


def _backend_of(recipe: Recipe, topology: Topology, request: Request) -> str:
    launch = recipe.launch
    if launch.backend == "auto":
        by_hand = request.rdzv_endpoint is not None or request.node_rank != 0
        more = launch.max_nodes > 1 or (launch.gpus != "auto" and launch.gpus > topology.num_gpus)
        if by_hand or not (topology.has_slurm or launch.max_nodes > 1):
            return "torchrun"
        # Several nodes with a profile are meant for its cluster also where a plan is only looked at, without SLURM.
        return "slurm" if launch.profile is not None or (topology.has_slurm and more) else "torchrun"
    if launch.backend == "slurm" and (request.node_rank or request.rdzv_endpoint):
        raise UsageError("--node-rank and --rdzv-endpoint are for nodes without SLURM; a job's nodes find each other")
    return launch.backend


def _choose_for_job(recipe: Recipe) -> tuple[DeviceType, int]:
    """Device and workers per node of a batch job, whose nodes this machine cannot see."""
    launch = recipe.launch
    if launch.gpus != "auto":
        return "cuda", launch.gpus
    if launch.procs == "auto":
        raise UsageError("a SLURM job must say what it needs: --gpus M (GPUs per node), or --procs P for CPU workers")
    return ("cuda" if launch.device == "cuda" else "cpu"), launch.procs


def _said_threads_of_job(profile: Profile, topology: Topology) -> int | None:
    """OMP_NUM_THREADS as the profile or the shell says, which SLURM hands on."""
    said = profile.env.get("OMP_NUM_THREADS", "")
    return (int(said) if said.isdigit() else 0) or topology.omp_num_threads


def _choose_device(recipe: Recipe, topology: Topology) -> DeviceType:
    launch = recipe.launch
    if launch.gpus != "auto" or launch.device == "cuda":
        wanted = 1 if launch.gpus == "auto" else launch.gpus
        if wanted > topology.num_gpus:
            has = f"only {topology.num_gpus}" if topology.num_gpus else "none"
            raise UsageError(
                f"{wanted} GPU{'s' if wanted > 1 else ''} per node asked for, but {topology.host} has {has}; "
                + (f"use --gpus {topology.num_gpus}, or " if topology.num_gpus else "")
                + "use --procs N for N workers on the CPU; `launch doctor` says what torch sees"
            )
        return "cuda"
    if launch.device == "auto":
        return "cuda" if topology.num_gpus else "cpu"
    return launch.device


def _choose_procs(recipe: Recipe, topology: Topology, device: str) -> int:
    launch = recipe.launch
    if device == "cpu":
        return 1 if launch.procs == "auto" else launch.procs
    gpus = topology.num_gpus if launch.gpus == "auto" else launch.gpus
    if launch.backend == "local":
        return 1
    if launch.procs != "auto" and launch.procs > gpus:
        raise UsageError(
            f"{launch.procs} workers per node asked for, but {topology.host} has {gpus} GPUs and each worker takes "
            "one; launch.device=cpu puts workers on the CPU"
        )
    return gpus if launch.procs == "auto" else launch.procs


def _choose_endpoint(launch: LaunchConfig, request: Request) -> str:
    nodes, started = launch.max_nodes, launch.max_nodes + launch.spares
    if nodes == 1:
        if request.node_rank or request.rdzv_endpoint:
            raise UsageError("--node-rank and --rdzv-endpoint are for more than one node; add --nodes N")
        return "127.0.0.1:0"
    endpoint = request.rdzv_endpoint or ""
    if not _ENDPOINT.fullmatch(endpoint) or int(endpoint.rpartition(":")[2]) > MAX_PORT:
        found = f"found --rdzv-endpoint {endpoint}; " if endpoint else ""
        raise UsageError(
            f"{nodes} nodes without SLURM: {found}run the same command once on every node with --node-rank K and "
            "--rdzv-endpoint HOST:PORT (a name or address of node 0, an IPv6 address in brackets, and a free port "
            f"there, 1 to {MAX_PORT}), as in node0:29400 or [2001:db8::1]:29400"
        )
    if not 0 <= request.node_rank < started:
        raise UsageError(f"--node-rank {request.node_rank}: nodes are counted from 0, so at most {started - 1}")
    if request.run_dir is None:
        raise UsageError(f"{nodes} nodes: give all of them the same --run-dir, on a file system they share")
    return endpoint
