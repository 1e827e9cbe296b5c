"""One round of a check of the nodes: groups of them add up tensors, with a process for each worker that is to come."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from typing import TYPE_CHECKING, Any

from launcher.system.files import write_json_atomic
from launcher.system.waiting import is_listed, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection
    from pathlib import Path

    from launcher.plan.launch_plan import LaunchPlan

Groups = list[list[int]]
"""Node ranks, in groups that try an all-reduce at the same time."""
MOST_ON_CPU = 2
"""Workers of a node that take part where they compute on the CPU: they share one network and the node's cores."""


def num_workers(plan: LaunchPlan) -> int:
    """How many workers of each node take part: one for each of its GPUs."""
    return plan.procs_per_node if plan.device == "cuda" else min(MOST_ON_CPU, plan.procs_per_node)


def answer_of(folder: Path, number: int, node: int) -> Path:
    """Where a node says how a round went."""
    return folder / f"round-{number}-node-{node}.json"


def left_of(folder: Path, number: int, node: int) -> Path:
    """Where a node says that its processes of a round have ended, and its port is free for the next one."""
    return folder / f"round-{number}-left-{node}"


def take_part(
    folder: Path,
    number: int,
    groups: Groups,
    endpoints: Sequence[str],
    plan: LaunchPlan,
    *,
    timeout_s: float,
    heed: Callable[[], None],
) -> None:
    """Take part in a round, in processes that can be ended; leaves the outcome in a file.

    Nobody of a group leaves before all have answered: one that is done earlier holds the others' connections.

    Args:
        folder: of the check.
        number: of the round.
        groups: that try it at the same time.
        endpoints: where each node listens if it is the first of its group.
        plan: as this node carries it out.
        timeout_s: how long it may take.
        heed: called again and again; what it raises ends the round.
    """
    group = next((group for group in groups if plan.node_rank in group), None)
    if group is None:
        return
    failed = folder / f"round-{number}-failed-{group[0]}"  # made by the first that fails: the others need not wait
    answers = [answer_of(folder, number, node) for node in group]
    start = time.monotonic()

    def time_left() -> float:
        return max(0.0, timeout_s - (time.monotonic() - start))

    processes, ears = _start(group, endpoints[group[0]], plan, timeout_s)
    said: dict[int, Any] = {}

    def is_over() -> bool:
        for index, ear in enumerate(ears):
            with contextlib.suppress(EOFError, OSError):  # it has ended without a word
                if index not in said and ear.poll():
                    said[index] = ear.recv()
        ended = any(one.exitcode is not None and index not in said for index, one in enumerate(processes))
        return len(said) == len(ears) or ended or failed.exists()

    try:
        wait_until(is_over, timeout_s=time_left(), heed=heed)
        found = {"ok": len(said) == len(ears), "seconds": time.monotonic() - start} | _slowest(list(said.values()))
        if not found["ok"]:
            failed.touch()
        write_json_atomic(answer_of(folder, number, plan.node_rank), found)
        wait_until(lambda: failed.exists() or all(map(is_listed, answers)), timeout_s=time_left(), heed=heed)
    finally:
        for process in processes:
            process.kill()
        for process, ear in zip(processes, ears, strict=True):
            process.join()
            ear.close()
        with contextlib.suppress(OSError):  # what went wrong before is what is told
            left_of(folder, number, plan.node_rank).touch()


def _start(
    group: Sequence[int], endpoint: str, plan: LaunchPlan, timeout_s: float
) -> tuple[list[multiprocessing.process.BaseProcess], list[Connection]]:
    """Start this node's processes; return them, and what hears of each."""
    from launcher.engine.allreduce import all_reduce

    fork, num = multiprocessing.get_context("fork"), num_workers(plan)
    processes: list[multiprocessing.process.BaseProcess] = []
    ears: list[Connection] = []
    for local_rank in range(num):
        ear, mouth = fork.Pipe(duplex=False)
        rank = group.index(plan.node_rank) * num + local_rank
        arguments = (endpoint, rank, len(group) * num, local_rank, num, plan.device, timeout_s, mouth)
        process = fork.Process(target=all_reduce, args=arguments)
        process.start()
        mouth.close()
        processes.append(process)
        ears.append(ear)
    return processes, ears


def _slowest(said: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Of what the workers of a node have measured, the least."""
    names = {name for one in said for name in one}
    found = {name: [value for one in said if (value := one.get(name)) is not None] for name in names}
    return {name: min(values, default=None) for name, values in found.items()}
