"""The attempts of a run, as events.jsonl has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.run_dir import read_jsonl

if TYPE_CHECKING:
    from launcher.run_dir import RunDir


def next_attempt(run: RunDir) -> int:
    """The number of the next start of the workers, from 1."""
    return 1 + max((event.get("attempt", 0) for event in events(run, "attempt_started")), default=0)


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    """All events of a kind, oldest first."""
    return [event for event in read_jsonl(run.events) if event.get("kind") == kind]
