"""A cluster's profile: what SLURM has to be told there, written down once (``slurm/profiles/*.yaml``)."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationError

from launcher.errors import Problem, RecipeError, UsageError, did_you_mean
from launcher.recipe import schema_errors
from launcher.recipe import source as recipe_source
from launcher.recipe.paths import is_profile_path
from launcher.recipe.types import STRICT, Count, Positive, validate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.recipe.source import Source

Line = Annotated[str, Field(pattern=r"^[^\r\n]*$")]
"""Text of one line: a second one would become a command of the batch script."""
PACKAGED = Path(__file__).parents[1] / "profiles"
_FIELDS = ("partition", "account", "qos", "constraint", "reservation", "exclude", "exclusive", "gres")
_MAIL = ("mail_user", "mail_type")
PLACES = {
    **{name.replace("_", "-"): f"the profile's {name}" for name in (*_FIELDS, *_MAIL)},
    "time": "the profile's timeout_min",
    "signal": "the profile's lead_s",
    "mem": "the profile's mem_gb",
    "cpus-per-task": "the profile's cpus_per_gpu",
    "nodes": "launch.nodes (--nodes)",
    "gpus-per-node": "launch.gpus (--gpus)",
    "job-name": "the recipe's name",
    "array": "--sweep",
    **dict.fromkeys(("ntasks", "ntasks-per-node"), "nowhere: it is one task a node, which starts the workers"),
    **dict.fromkeys(("output", "error", "open-mode"), "nowhere: the log is read in the run directory"),
    **dict.fromkeys(("requeue", "no-requeue"), "nowhere: a job is always queued again where its run goes on"),
}
"""Options of sbatch that are said elsewhere: said twice, one would win in silence, or a log not be where it is read."""
OVERRIDE = "profile."
"""Begins the overrides that are meant for the profile, as in ``profile.timeout_min=30``."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What the jobs of a cluster ask for. Values reach SLURM quoted: none is ever run by a shell but ``setup``."""

    __pydantic_config__ = STRICT

    name: str = "profile"
    """Of the profile; where absent, the file's name."""
    partition: Line | None = None
    """Partition, or several with commas; null: the cluster's default."""
    account: Line | None = None
    """Whom the job is charged to."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that the nodes must have, as in `a100&ib`."""
    reservation: Line | None = None
    """Name of a reservation."""
    exclude: Line | None = None
    """Nodes not to use, as in `n[3-4]`; nodes that fail during a run are added by themselves."""
    timeout_min: Count = 240
    """Minutes after which SLURM ends the job; the run saves before, is requeued and goes on."""
    lead_s: Annotated[int, Field(ge=10, le=3600)] = 120
    """Seconds before the time limit at which the run is told to save; longer than a checkpoint takes."""
    mem_gb: Positive | None = None
    """Memory per node in gigabytes; null: the cluster's default."""
    cpus_per_gpu: Count = 8
    """CPU cores of each worker; one worker per GPU, or `launch.procs` of them without GPUs."""
    gres: Line | None = None
    """Asks for GPUs by this name (`gpu:a100`) where the cluster wants --gres; null: by --gpus-per-node."""
    exclusive: bool = False
    """Whole nodes."""
    mail_user: Line | None = None
    """Address for SLURM's mail."""
    mail_type: Line | None = None
    """When, as in END,FAIL."""
    interface: Line | None = None
    """Network interface of the workers (`ib0`); null: the one on the route between the nodes."""
    setup: list[Line] = field(default_factory=list)
    """Lines of shell on the first node before anything else: modules, conda, a virtual environment. One that fails ends
    the job; where it may fail let it end in `|| true`."""
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Line] = field(default_factory=dict)
    """Environment variables of the job."""
    python: Line | None = None
    """Command that runs Python on the nodes, as in `apptainer exec --nv image.sif python`; null: this one's."""
    srun_args: list[Line] = field(default_factory=list)
    """Further options of srun, as in `--container-image=/images/train.sqsh`."""
    sbatch: dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], Line | int | bool] = field(default_factory=dict)
    """Further options of sbatch by their long names, as in {licenses: matlab, switches: 1}; true: without a value. What
    has a place of its own, in the profile or the recipe, is refused here."""


def load(name: str, overrides: Sequence[str] = ()) -> Profile:
    """Read a profile by path or name: the user's own first, then those that come with this package.

    Args:
        name: a path of a YAML file, or a bare name.
        overrides: items such as ``profile.timeout_min=30``, as typed.

    Raises:
        UsageError: there is none of this name; lists those there are.
        RecipeError: names every problem in it.
    """
    return _checked(recipe_source.read(str(find(name)), overrides, {}, schema=Profile, prefix=OVERRIDE), name)


def change(before: Profile, overrides: Sequence[str]) -> Profile:
    """An earlier profile with overrides.

    Raises:
        RecipeError: names every problem in it.
    """
    name = f"profile {before.name}"
    source = recipe_source.from_values(name, asdict(before), overrides, schema=Profile, prefix=OVERRIDE)
    return _checked(source, before.name)


def _checked(source: Source, name: str) -> Profile:
    problems = list(source.problems)
    try:
        profile: Profile = validate(Profile, source.values)
    except ValidationError as error:
        problems += schema_errors.explain(error, source, Profile)
    else:
        for option in filter(PLACES.__contains__, profile.sbatch):
            key = f"sbatch.{option}"
            problems.append(Problem(key=key, where=source.where(key), message=f"its place is {PLACES[option]}"))
    if problems:
        raise RecipeError(problems, of=f"profile {name}")
    return profile


def find(name: str) -> Path:
    """The file of a profile.

    Raises:
        UsageError: there is none.
    """
    if is_profile_path(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"--profile {name}: no such file")
        return path
    found = available()
    if name not in found:
        near = did_you_mean(name, found)
        valid = f"valid: {', '.join(sorted(found))}, or a path; your own go into {user_folder()}/NAME.yaml"
        raise UsageError(" ".join(filter(None, [f"--profile {name}: no such profile;", near, valid])))
    return found[name]


def available() -> dict[str, Path]:
    """Profiles by name; the user's hide packaged ones."""
    return {path.stem: path for folder in (PACKAGED, user_folder()) for path in sorted(folder.glob("*.yaml"))}


def user_folder() -> Path:
    """Where a user's own profiles are."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "finetune-launcher" / "profiles"
