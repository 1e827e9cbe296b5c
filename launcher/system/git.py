"""Which commit of a git repository a folder is at."""

from __future__ import annotations

import subprocess

TIMEOUT_S = 2.0
"""On a slow file system: the answer is worth no longer wait."""


def commit() -> str:
    """Of the current folder, with "+" where tracked files differ from it; "": there is no repository, or no git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return f"{head}+" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return done.stdout.strip()
