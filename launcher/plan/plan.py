"""From a recipe and the facts of a machine to a plan: frozen, pure, printable. What it prints is what runs."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError
from launcher.plan import batch_script, variables
from launcher.plan import profile as profiles
from launcher.recipe import load as recipes
from launcher.recipe.keys import flat, show

if TYPE_CHECKING:
    from launcher.plan.profile import Profile
    from launcher.plan.topology import Topology
    from launcher.recipe.schema import Recipe

MAX_PORT = 65_535
_ENDPOINT = re.compile(r"(?:[^\s:/\[\]]+|\[[0-9A-Fa-f:.]+\]):0*[1-9][0-9]*")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line says beyond the recipe."""

    run_id: str
    """The run's id, new or that of the run to go on with."""
    run_dir: str | None = None
    """Where the run's files go; None: runs/RUN_ID."""
    node_rank: int = 0
    """Which of the nodes this one is, where `launch` is run on each by hand."""
    rdzv_endpoint: str | None = None
    """``HOST:PORT`` of node 0, where the nodes meet; None on a single node."""
    debug: bool = False
    """A handful of steps in this process."""
    tune: bool = False
    """Only measure batch sizes."""
    detach: bool = False
    """Return when the job is submitted."""


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """How a run is carried out."""

    run_id: str
    """The run's id and, where wandb is on, its id there."""
    name: str
    """The recipe's name."""
    run_dir: str
    """Where the run's files go."""
    backend: str
    """local, torchrun or slurm."""
    device: str
    """cuda or cpu."""
    nodes: int
    """Machines."""
    procs_per_node: int
    """Workers on each."""
    threads_per_proc: int
    """CPU threads of each worker's computations: OMP_NUM_THREADS where it is set, else the node's cores shared out."""
    export_threads: int | None
    """CPU threads of the exports: launch.threads, or OMP_NUM_THREADS where it is set; None: all cores there are."""
    max_restarts: int
    """How often the workers are started again after one died."""
    preflight: bool
    """Check the nodes of a job before training."""
    hang_timeout_s: float | None
    """Seconds without a step after which the workers are taken for hung."""
    node_rank: int
    """Which node this one is."""
    rdzv_endpoint: str
    """Where torch's elastic agents meet; port 0 is any free one; empty: the job's first node decides."""
    debug: bool
    """A handful of steps in this process."""
    tune: bool
    """Only measure batch sizes (`launch tune`)."""
    detach: bool
    """Return when the job is submitted, for slurm."""
    env: dict[str, str]
    """Environment variables of the supervisor and its workers."""
    command: tuple[str, ...]
    """What runs here; empty for local, which trains in the process of ``launch``, and for a job to be submitted."""
    profile: dict[str, Any] | None
    """The cluster's profile, for slurm."""
    script: str = field(repr=False)
    """The batch script, for slurm outside of an allocation; else empty."""
    post_script: str = field(repr=False)
    """The batch script of the job that makes the exports; empty: they are made where rank 0 trained."""
    recipe: dict[str, Any] = field(repr=False)
    """The resolved recipe."""

    @property
    def world_size(self) -> int:
        """Workers of the run."""
        return self.nodes * self.procs_per_node

    def to_dict(self) -> dict[str, Any]:
        """For ``plan.json``; the recipe lies beside it."""
        values = asdict(self) | {"world_size": self.world_size, "command": list(self.command)}
        del values["recipe"], values["script"], values["post_script"]
        return values | {"post_job": bool(self.post_script)}

    def __str__(self) -> str:
        """The plan as ``--dry-run`` prints it."""
        workers = f"{self.world_size} ({self.nodes} node{'s' if self.nodes > 1 else ''} x {self.procs_per_node})"
        rows = {
            "run": self.run_id,
            "run dir": self.run_dir,
            "backend": self.backend,
            "workers": workers,
            "device": f"{self.device}, {self.threads_per_proc} CPU threads per worker",
            "restarts": f"at most {self.max_restarts}" if self.max_restarts else "none",
            "environment": " ".join(f"{k}={shlex.quote(v)}" for k, v in self.env.items()),
            "command": "sbatch, with the script below"
            if self.script
            else shlex.join(self.command) or "none: in the process of `launch` itself",
        }
        if self.profile:
            rows["profile"] = self.profile["name"]
        lines = [f"{key:<12} {value}" for key, value in rows.items()]
        lines += ["", "recipe (* differs from the default)", *_recipe_lines(self.recipe)]
        for title, text in (("script of the exports", self.post_script), ("script", self.script)):
            lines += ["", title, text.rstrip("\n")] if text else []
        return "\n".join(lines)


def make_plan(
    recipe: Recipe,
    topology: Topology,
    request: Request,
    profile: Profile | None = None,
    post_profile: Profile | None = None,
) -> LaunchPlan:
    """Decide where and how a recipe runs. Pure: reads no file and starts nothing.

    Args:
        recipe: checked.
        topology: the facts of this machine.
        request: the rest of the command line.
        profile: of the cluster, where the recipe names one.
        post_profile: of the job that makes the exports, where the recipe names one.

    Raises:
        UsageError: the machine has not what is asked for; says what would work instead.
    """
    launch = recipe.launch
    backend = _choose_backend(recipe, topology, request)
    if request.detach and backend == "local":
        raise UsageError("--detach: --debug and launch.backend=local are for a terminal; leave one of them out")
    place = (
        _place_job(recipe, topology, request, profile or profiles.Profile(), post_profile)
        if backend == "slurm"
        else _place_here(recipe, topology, request)
    )
    said = place.said_threads if launch.threads == "auto" else launch.threads
    threads = place.threads if launch.threads == "auto" else launch.threads
    return LaunchPlan(
        run_id=request.run_id,
        name=recipe.name,
        run_dir=place.run_dir,
        backend=backend,
        device=place.device,
        nodes=launch.nodes,
        procs_per_node=place.procs,
        threads_per_proc=threads,
        export_threads=said or None,
        max_restarts=0 if backend == "local" else launch.max_restarts,
        preflight=launch.preflight,
        hang_timeout_s=recipe.train.hang_timeout_s,
        node_rank=request.node_rank,
        rdzv_endpoint=place.endpoint,
        debug=request.debug,
        tune=request.tune,
        detach=request.detach,
        env=environment(device=place.device, nodes=launch.nodes, threads=threads),
        command=place.command if backend != "local" else (),
        profile=profiles.to_dict(place.profile) if place.profile else None,
        script=place.script,
        post_script=place.post_script,
        recipe=recipes.to_dict(recipe),
    )


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a run goes, and what is started there."""

    device: str
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


def _place_job(
    recipe: Recipe, topology: Topology, request: Request, profile: Profile, post_profile: Profile | None
) -> _Place:
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
        nodes=recipe.launch.nodes,
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
    return _Place(
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


def _place_here(recipe: Recipe, topology: Topology, request: Request) -> _Place:
    """This machine, or one of several that are started by hand."""
    device = _choose_device(recipe, topology)
    procs = _choose_procs(recipe, topology, device)
    nodes, run_dir = recipe.launch.nodes, _run_dir(request)
    endpoint, said = _choose_endpoint(nodes, request), topology.omp_num_threads or 0
    command: tuple[str, ...] = ("python", "-m", "launcher.node", run_dir, "--node-rank", str(request.node_rank))
    if nodes > 1:
        command += ("--nodes", str(nodes), "--procs", str(procs), "--rdzv-endpoint", endpoint)
    return _Place(
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


def _choose_backend(recipe: Recipe, topology: Topology, request: Request) -> str:
    launch = recipe.launch
    if launch.backend == "auto":
        by_hand = request.rdzv_endpoint is not None or request.node_rank != 0
        more = launch.nodes > 1 or (launch.gpus != "auto" and launch.gpus > topology.num_gpus)
        if by_hand or not (topology.has_slurm or launch.nodes > 1):
            return "torchrun"
        # Several nodes with a profile are meant for its cluster also where a plan is only looked at, without SLURM.
        return "slurm" if launch.profile is not None or (topology.has_slurm and more) else "torchrun"
    if launch.backend == "slurm" and (request.node_rank or request.rdzv_endpoint):
        raise UsageError("--node-rank and --rdzv-endpoint are for nodes without SLURM; a job's nodes find each other")
    return launch.backend


def _choose_for_job(recipe: Recipe) -> tuple[str, int]:
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


def _choose_device(recipe: Recipe, topology: Topology) -> str:
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


def _choose_endpoint(nodes: int, request: Request) -> str:
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
    if not 0 <= request.node_rank < nodes:
        raise UsageError(f"--node-rank {request.node_rank}: nodes are counted from 0, so at most {nodes - 1}")
    if request.run_dir is None:
        raise UsageError(f"{nodes} nodes: give all of them the same --run-dir, on a file system they share")
    return endpoint


def environment(*, device: str, nodes: int, threads: int) -> dict[str, str]:
    """What the supervisor and its workers need in theirs."""
    # A store of their own for the workers of each attempt: in the agent's they find the addresses of the one before,
    # and a restart hangs (seen with torch 2.14).
    env = {"OMP_NUM_THREADS": str(threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    else:
        env["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # counting GPUs must not start CUDA in a process that forks
    if nodes == 1:
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env


def _recipe_lines(recipe: dict[str, Any]) -> list[str]:
    defaults = dict(flat(recipes.from_dict({})))
    values = flat(recipes.from_dict(recipe))
    return [f"{'*' if defaults[key] != value else ' '} {key}: {show(value)}" for key, value in values]
