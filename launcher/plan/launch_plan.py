"""How a run is carried out: frozen, printable, and the content of ``plan.json``. Read in every process of a run."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.plan.profile import Profile


DeviceType = Literal["cuda", "cpu"]


UNCHECKED = "names of layers, your own code, the images, the cluster: a start checks them first"
"""What ``--dry-run`` does not look at, since it imports no torch and asks no cluster."""


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """How a run is carried out."""

    run_id: str
    """The run's id and, where wandb is on, its id there."""
    name: str = ""
    """The recipe's name."""
    run_dir: str = ""
    """Where the run's files go."""
    backend: str = ""
    """local, torchrun or slurm."""
    device: DeviceType = "cpu"
    """cuda or cpu."""
    nodes: int = 1
    """Machines."""
    min_nodes: int = 0
    """With at least so many of them the run goes on where others are lost; 0: only with all."""
    spares: int = 0
    """Machines beyond them that wait to take the place of one that is lost."""
    procs_per_node: int = 1
    """Workers on each."""
    threads_per_proc: int = 1
    """CPU threads of each worker's computations: OMP_NUM_THREADS where it is set, else the node's cores shared out."""
    export_threads: int | None = None
    """CPU threads of the exports: launch.threads, or OMP_NUM_THREADS where it is set; None: all cores there are."""
    max_restarts: int = 0
    """How often the workers are started again after one died."""
    preflight: bool = False
    """Check the nodes of a job before training."""
    hang_timeout_s: float | None = None
    """Seconds without a step after which the workers are taken for hung."""
    node_rank: int = 0
    """Which node this one is; of those that train together, where these are not all (``members``)."""
    rdzv_endpoint: str = ""
    """Where torch's elastic agents meet; port 0 is any free one; empty: the job's first node decides."""
    debug: bool = False
    """A handful of steps in this process."""
    tune: bool = False
    """Only measure batch sizes (`launch tune`)."""
    detach: bool = False
    """Return when the job is submitted, for slurm."""
    keep_freed_memory: bool = False
    """Have the workers' allocator keep what they free, on a CPU."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the supervisor and its workers."""
    command: tuple[str, ...] = ()
    """What runs here; empty for local, which trains in the process of ``launch``, and for a job to be submitted."""
    profile: Profile | None = None
    """The cluster's profile, for slurm."""
    post_job: bool = False
    """A job of its own makes the exports, else they are made where rank 0 trained."""
    script: str = field(default="", repr=False)
    """The batch script, for slurm outside of an allocation; else empty. Not in plan.json."""
    post_script: str = field(default="", repr=False)
    """The batch script of the job that makes the exports; else empty. Not in plan.json."""
    recipe: dict[str, Any] = field(default_factory=dict, repr=False)
    """The resolved recipe. Not in plan.json: recipe.yaml lies beside it."""
    address: str = ""
    """Where the other nodes reach this one, once they have met. Not in plan.json."""
    members: tuple[int, ...] = ()
    """Which of the run's nodes train together now, in their order; empty: all. Not in plan.json."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The plan in ``plan.json``; what an older launcher has not written there has its default."""
        known = _known(cls, values)
        known["command"] = tuple(known.get("command", ()))
        if known.get("profile"):
            from launcher.plan.profile import Profile

            known["profile"] = Profile(**_known(Profile, known["profile"]))
        return cls(**known)

    @property
    def node(self) -> int:
        """Which of the run's nodes this one is, whichever of them train together now."""
        return self.members[self.node_rank] if self.members else self.node_rank

    @property
    def fewest_nodes(self) -> int:
        """With how many nodes, at least, the run trains."""
        return self.min_nodes or self.nodes

    @property
    def is_elastic(self) -> bool:
        """Whether the run goes on without a node that is lost, and takes in nodes that come."""
        return self.fewest_nodes < self.nodes or self.spares > 0

    @property
    def machines(self) -> int:
        """How many are asked for: those that train, and the spare ones."""
        return self.nodes + self.spares

    @property
    def world_size(self) -> int:
        """Workers of the run."""
        return self.nodes * self.procs_per_node

    def to_dict(self) -> dict[str, Any]:
        """For ``plan.json``; the recipe lies beside it."""
        values = asdict(self) | {"world_size": self.world_size, "command": list(self.command)}
        for name in ("recipe", "script", "post_script", "address", "members"):
            del values[name]
        return values

    def __str__(self) -> str:
        """The plan as ``--dry-run`` prints it."""
        workers = f"{self.world_size} ({self.nodes} node{'s' if self.nodes > 1 else ''} x {self.procs_per_node})"
        rows = {
            "run": self.run_id,
            "run dir": self.run_dir,
            "backend": self.backend,
            "workers": workers,
            **({"elastic": self._elastic_row()} if self.is_elastic else {}),
            "device": f"{self.device}, {self.threads_per_proc} CPU threads per worker",
            "restarts": f"at most {self.max_restarts}" if self.max_restarts else "none",
            "environment": " ".join(f"{k}={shlex.quote(v)}" for k, v in self.env.items()),
            "command": "sbatch, with the script below"
            if self.script
            else shlex.join(self.command) or "none: in the process of `launch` itself",
        }
        if self.profile:
            rows["profile"] = self.profile.name
        rows["not checked"] = UNCHECKED
        lines = [f"{key:<12} {value}" for key, value in rows.items()]
        lines += ["", "recipe (* differs from the default)", *_recipe_lines(self.recipe)]
        for title, text in (("script of the exports", self.post_script), ("script", self.script)):
            lines += ["", title, text.rstrip("\n")] if text else []
        return "\n".join(lines)

    def _elastic_row(self) -> str:
        """What becomes of the run when a node is lost."""
        batch = self.recipe["batch"]
        size, per_rank = batch["global_size"], batch["size"]
        if size is None and per_rank != "auto":
            size = self.world_size * per_rank * batch["accumulate"]
        images = f"{size} images" if size else "its size is measured"
        spare = f", {self.spares} spare" if self.spares else ""
        return f"goes on with {self.fewest_nodes} or more nodes{spare}; a step is always that of {self.nodes}: {images}"


@dataclass(frozen=True, kw_only=True)
class Launched:
    """By whom, when and with what code a plan was launched; beside it in ``plan.json``."""

    created: float = 0.0
    """When, in seconds since 1970."""
    code: str = ""
    """Digest of the launcher's code."""
    host: str = ""
    """Name of the machine."""
    pid: int = 0
    """The process that carries the run out, or has submitted its job."""
    process_started: str | None = None
    """When that process was started, by which another one of the same number is told from it."""
    variables: list[str] = field(default_factory=list)
    """Names of the environment variables that the job must not lose on its way."""
    launched_by: str = ""
    """The command that somebody typed."""
    commit: str = ""
    """The git commit of the folder where it was typed, with "+" where files differ from it; "": there is none."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What ``plan.json`` says of it."""
        return cls(**_known(cls, values))


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some values that a dataclass has fields for: a newer launcher may have written more."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


def _recipe_lines(recipe: dict[str, Any]) -> list[str]:
    from launcher.recipe import load as recipes
    from launcher.recipe.keys import flat, show

    defaults = dict(flat(recipes.from_dict({})))
    values = flat(recipes.from_dict(recipe))
    return [f"{'*' if defaults[key] != value else ' '} {key}: {show(value)}" for key, value in values]
