"""Environment variables of the shell that launches a job: what fills its profile, and what the job must not lose."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launcher.plan.profile import PLACES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from launcher.plan.profile import Profile

SBATCH = "SBATCH_"
FILLS = {f"{SBATCH}{name.upper()}": name for name in ("account", "partition", "qos", "reservation", "constraint")}
"""Variables of sbatch that say what the profile leaves open."""
_OPTIONS = {"TIMELIMIT": "time", "MEM_PER_NODE": "mem", "ARRAY_INX": "array"}
"""Variables of sbatch that are not named as the option they stand for."""
READ_BEGINNINGS = (
    "WANDB_",
    "MLFLOW_",
    "HF_",
    "TORCH_",
    "PYTORCH_",
    "NCCL_",
    "GLOO_",
    "OMP_",
    "MKL_",
    "FINETUNE_LAUNCHER_",
)
READ_NAMES = ("PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "XDG_CACHE_HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

CURE = "what the run needs of it goes into the profile, under env or setup (tokens: a setup line that reads a file)"


def fill(profile: Profile, variables: Mapping[str, str]) -> Profile:
    """The profile with what it leaves open as sbatch's own variables say it."""
    open_fields: dict[str, Any] = {
        field: variables[name]
        for name, field in FILLS.items()
        if variables.get(name) and getattr(profile, field) is None
    }
    return replace(profile, **open_fields)


def notes(variables: Mapping[str, str], profile: Profile) -> Iterator[str]:
    """What becomes of each of sbatch's variables.

    Args:
        variables: of the shell.
        profile: of the plan, filled.
    """
    for name, value in variables.items():
        if not (value and name.startswith(SBATCH)):
            continue
        field = FILLS.get(name)
        own = getattr(profile, field) if field else None
        if field and own == value:
            yield f"{name}: the job's {field} is {value}"
        elif field:
            yield f"{name}={value} is ignored: the profile's {field} is {own}"
        else:
            option = _OPTIONS.get(name.removeprefix(SBATCH), name.removeprefix(SBATCH).lower().replace("_", "-"))
            place = PLACES.get(option, f"the profile: sbatch: {{{option}: {value}}}")
            yield f"{name}={value} is ignored; its place is {place}"


def read_by_runs(variables: Mapping[str, str]) -> list[str]:
    """Names of those that a run, or what it runs on, reads; a job without them may go another way than was meant."""
    return sorted(name for name in variables if name.startswith(READ_BEGINNINGS) or name.upper() in READ_NAMES)
