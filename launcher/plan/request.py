"""What the command line asks for beyond the recipe."""

from __future__ import annotations

from dataclasses import dataclass


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
