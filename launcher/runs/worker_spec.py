"""What a worker is told by whoever starts it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """All arguments of a worker; the rest it reads from the run directory and torchrun's environment variables."""

    run_dir: str
    """Absolute path of the run directory."""
    attempt: int
    """Which start of the workers this is, from 1; a restart counts."""
    debug: bool = False
    """In this process, with a handful of steps and no files but those of the run."""
