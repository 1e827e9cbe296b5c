"""What a run is called, and what code it was launched with."""

from __future__ import annotations

import hashlib
import secrets
import time
from pathlib import Path


def new_run_id(name: str) -> str:
    """``NAME-YYYYmmdd-HHMMSS-xxxx``: the run's id, its folder's name and its wandb id, fixed before anything starts."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def code_digest() -> str:
    """Digest of this package's code, by which a requeued run notices that it was edited (submitit#1717)."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for folder in (package, package / "tools"):  # the latter is a link, which rglob does not follow
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
