"""What is written down and said of the generations of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.runs import history, states

if TYPE_CHECKING:
    from launcher.runs.generations import Generation
    from launcher.runs.run_dir import RunDir


def close_attempt(run: RunDir, last: Generation, *, node: int, reason: str) -> str | None:
    """Record that the attempt under way has ended because a node was lost.

    Returns:
        Why no other attempt should begin, where losses follow each other without a new step in between.
    """
    attempt = history.next_attempt(run) - 1
    if attempt < last.attempt:
        return None  # it had not begun
    run.append_event("attempt_ended", attempt=attempt, node=node, cause="lost_node", message=reason)
    refused = history.refusal(run)
    if refused:
        run.append_event("refused", message=refused)
        states.move(run, "failed", attempt=attempt)
    return refused


def regrouped(run: RunDir, last: Generation, made: Generation, *, seconds: float, reason: str) -> None:
    """Write down who goes on, who was lost and who has come.

    Args:
        run: the run directory.
        last: the generation before; of number 0 where there was none.
        made: the new one.
        seconds: since this node noticed why there must be a new one.
        reason: why, in words.
    """
    if not last.number:
        run.update_status(nodes=len(made.members))
        return
    states.move(run, "running", attempt=made.attempt, nodes=len(made.members))
    for member in last.members:
        if made.index(member.start) is None:
            run.append_event("node_lost", node=member.node, name=member.host, generation=last.number, message=reason)
    for member in made.members:
        if last.index(member.start) is None:
            run.append_event("node_joined", node=member.node, name=member.host, generation=made.number)
    run.append_event(
        "regrouped",
        generation=made.number,
        members=list(made.nodes),
        attempt=made.attempt,
        step=newest_step(run),
        seconds=round(seconds, 2),
    )


def newest_step(run: RunDir) -> int:
    """That of the newest checkpoint; 0 where there is none."""
    state = run.newest_state()
    return int(state["step"]) if state else 0


def num_restarts(run: RunDir, first_attempt: int) -> int:
    """How often workers were started again since an attempt, for another reason than a lost node."""
    ended = history.events(run, "attempt_ended")
    return len({e["attempt"] for e in ended if e["attempt"] >= first_attempt and e["cause"] != "lost_node"})


def names(generation: Generation) -> str:
    """A generation as a person knows it: its nodes, with their machines."""
    return ", ".join(f"node {one.node} ({one.host})" for one in generation.members)
