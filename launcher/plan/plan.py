"""From a recipe and the facts of a machine to a plan: frozen, pure, printable. What it prints is what runs."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.plan import place as places
from launcher.plan import profile as profiles
from launcher.recipe import load as recipes
from launcher.recipe.keys import flat, show

if TYPE_CHECKING:
    from launcher.plan.profile import Profile
    from launcher.plan.request import Request
    from launcher.plan.topology import Topology
    from launcher.recipe.schema import Recipe


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
    backend = places.choose_backend(recipe, topology, request)
    if backend == "slurm":
        place = places.as_job(recipe, topology, request, profile or profiles.Profile(), post_profile)
    else:
        place = places.here(recipe, topology, request)
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
