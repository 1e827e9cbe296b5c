"""What somebody asks for on the command line: it crosses the road from there to the plan, and nothing changes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.plan.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    recipe: str = ""
    """Path of the recipe, or the bare name of one that comes with the package."""
    overrides: tuple[str, ...] = ()
    """``key=value`` for the recipe."""
    profile_overrides: tuple[str, ...] = ()
    """``profile.key=value`` for the cluster's profile."""
    nodes: int | str | None = None
    """``--nodes``, a number or MIN:MAX; here and below None says that the recipe decides."""
    spares: int | None = None
    """``--spares``."""
    gpus: int | None = None
    """``--gpus``."""
    procs: int | None = None
    """``--procs``."""
    backend: str | None = None
    """``--backend``."""
    profile: str | None = None
    """``--profile``."""
    kept_profile: Profile | None = None
    """That of the run to go on with; ``--profile`` wins over it."""
    run_id: str = ""
    """Of the run to go on with; empty: a new one."""
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
    new_code: bool = False
    """Take the user's own code anew from where it was, instead of the run's copy."""
    dry_run: bool = False
    """Print the plan; write and start nothing."""

    def flags(self) -> dict[str, tuple[str, Any]]:
        """The flags as overrides of the recipe, each with its name for errors; ``--debug`` is a set of them."""
        values = {name: getattr(self, name) for name in ("nodes", "spares", "gpus", "procs", "backend", "profile")}
        flags: dict[str, tuple[str, Any]] = {
            f"launch.{name}": (f"--{name}", value) for name, value in values.items() if value is not None
        }
        if self.debug:
            one = {"nodes": 1, "spares": 0, "gpus": "auto", "procs": 1, "backend": "local", "profile": None}
            flags |= {f"launch.{name}": ("--debug", value) for name, value in one.items()}
        return flags
