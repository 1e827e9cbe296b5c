"""The one way by which a run comes from state to state, and which moves there are (docs/run-directory.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir, State

MOVES: dict[State, tuple[State, ...]] = {
    "pending": ("pending", "running", "preempted", "failed", "cancelled"),
    # Again: its workers were started anew. Pending: launched again after its process died, or queued without bad nodes.
    "running": ("running", "pending", "preempted", "completed", "early_stopped", "failed", "cancelled"),
    "preempted": ("preempted", "running", "pending", "failed", "cancelled"),
    # Running: another rank died when rank 0 was done, and the workers are started again.
    "completed": ("completed", "running", "pending", "failed"),
    "early_stopped": ("early_stopped", "running", "pending", "failed"),
    # Cancelled: the job of a run that has failed was still there.
    "failed": ("failed", "pending", "cancelled"),
    "cancelled": ("cancelled", "pending"),
}
"""From each state to which others. Whatever the state, somebody may launch the run again: then it is pending."""


def move(run: RunDir, state: State, **fields: Any) -> bool:
    """Write a run's state, and other fields of ``status.json`` with it.

    Whoever writes late changes nothing: a worker of an earlier attempt, as on a node that was lost; and whoever does
    not know that somebody has cancelled the run.

    Args:
        run: the run directory.
        state: the new one.
        fields: others that change.

    Returns:
        Whether it was written.
    """
    status = run.read_status()
    before: State = status["state"]
    if fields.get("attempt", status.get("attempt", 0)) < status.get("attempt", 0):
        return False
    if before == "cancelled" and state not in MOVES[before]:
        return False
    if state not in MOVES[before]:
        raise AssertionError(f"{run}: {before} -> {state}: a run never goes this way")
    run.update_status(state=state, **fields)
    return True


def of_test(split: str, best: dict[str, Any]) -> dict[str, Any]:
    """What ``status.json`` says of a test set beside what it measured: its name, and the checkpoint."""
    return {"split": split, "step": best["step"], "epoch": best["epoch"], "weights": best.get("weights")}


def is_tested(status: dict[str, Any], split: str | None, best: dict[str, Any] | None) -> bool:
    """Whether the test set, where there is one, was measured by this best checkpoint."""
    known = status.get("test") or {}
    return not (split and best) or known.items() >= of_test(split, best).items()
