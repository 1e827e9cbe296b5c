"""The attempts of a run, from events.jsonl: why each ended, and whether another may begin."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from launcher.runs.run_dir import BATCH_LOG_VARIABLE
from launcher.system.files import read_jsonl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.runs.run_dir import RunDir

BUDGETS = {
    "preempted": 3,
    "time_limit": 3,
    "lost_node": 3,
    "lost_worker": 3,
    "network": 3,
    "memory_kill": 5,
    "hang": 2,
    "out_of_memory": 1,
    "bug": 1,
    "usage": 1,
}
"""Give up after this many attempts in a row that end by a cause without a new step. While steps advance there is no
limit: a run may be preempted a hundred times."""
ADVICE = {
    "preempted": "each time before a checkpoint was written: lower train.checkpoint.every_minutes",
    "time_limit": "the time limit is too short for one checkpoint: raise timeout_min or lead_s in the profile",
}


def next_attempt(run: RunDir) -> int:
    """The number of the next start of the workers, from 1."""
    return 1 + max((event.get("attempt", 0) for event in events(run, "attempt_started")), default=0)


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    """All events of a kind, oldest first."""
    return [event for event in read_jsonl(run.events) if event.get("kind") == kind]


def since_launched(run: RunDir, kind: str) -> list[dict[str, Any]]:
    """The events of a kind since somebody last launched the run."""
    since = max((event["time"] for event in events(run, "launched")), default=0.0)
    return [event for event in events(run, kind) if event["time"] >= since]


def num_memory_kills(run: RunDir, node_rank: int) -> int:
    """How many attempts a node's workers have lost because memory ran out, since the last checkpoint was written."""
    saved = max((event["time"] for event in events(run, "checkpoint")), default=0.0)
    return len({e["attempt"] for e in events(run, "memory_kill") if e["node"] == node_rank and e["time"] > saved})


def cause_of_signal(name: str) -> str:
    """What a stop signal means in a run's history: a batch job's USR2 comes before its time limit."""
    if name == "SIGUSR2" and BATCH_LOG_VARIABLE in os.environ:
        return "time_limit"
    return "interrupted" if name in ("SIGINT", "SIGUSR2") else "preempted"


def close_attempt(run: RunDir, *, lost_nodes: Sequence[str] = ()) -> None:
    """Record the end of an attempt that recorded none: its first node was lost, or killed before it had saved.

    Args:
        run: the run directory.
        lost_nodes: names of nodes that SLURM reports as lost.
    """
    last = next_attempt(run) - 1
    ended = [event for event in events(run, "attempt_ended") if event.get("attempt") == last]
    outcomes = [event["outcome"] for event in events(run, "training_ended") if event["attempt"] == last]
    if not last or ended or any(outcome != "preempted" for outcome in outcomes):
        return
    started = [event for event in events(run, "attempt_started") if event.get("attempt") == last]
    killed = [e["host"] for e in events(run, "supervisor_lost") if e["time"] > started[0]["time"]]
    hosts = {event["host"] for event in started}
    # All nodes are told of a stop; where the first one was lost it is only the others, by SLURM.
    told = [e["signal"] for e in events(run, "signal") if e["node"] == 0 and e["time"] > started[0]["time"]]
    cause = "lost_node"
    if killed:
        message = f"the supervisor on {killed[0]} was killed"
    elif hosts.intersection(lost_nodes):
        message = f"SLURM lost {', '.join(sorted(hosts.intersection(lost_nodes)))} (node failure)"
    elif told:
        cause, message = cause_of_signal(told[0]), f"stopped by {told[0]}, and killed before the end of it"
    else:
        message = f"a node was lost without a word, one of {', '.join(sorted(hosts))}"
    run.append_event("attempt_ended", attempt=last, node=0, cause=cause, message=message)


def refusal(run: RunDir) -> str | None:
    """Why no further attempt should begin, or None. Only what happened since somebody last launched the run counts."""
    begun = {event["attempt"] for event in since_launched(run, "attempt_started")}
    ends = {e["attempt"]: e["cause"] for e in events(run, "attempt_ended") if e["attempt"] in begun}
    steps: dict[int, int] = {}
    for event in events(run, "checkpoint"):
        steps[event["attempt"]] = max(event["step"], steps.get(event["attempt"], 0))
    idle: list[str] = []
    reached = 0
    for attempt in sorted(ends.keys() | steps.keys()):
        if steps.get(attempt, 0) > reached:
            reached, idle = steps[attempt], []
        elif attempt in ends:
            idle.append(ends[attempt])
    if not idle or len(idle) < BUDGETS.get(idle[-1], 1):
        return None
    advice = ADVICE.get(idle[-1])
    count = f"{len(idle)} attempts in a row" if len(idle) > 1 else "an attempt"
    return f"{count} ended at step {reached} ({', '.join(idle)}), without a new one; not tried again" + (
        f": {advice}" if advice else ""
    )
