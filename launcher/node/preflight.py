"""Checks a job before training: each node has what it needs, and all reach each other; else, which node does not.

The nodes speak through small files in the run directory, which shows by itself that they share it. Node 0 decides.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from launcher import __version__
from launcher.errors import PreflightError, TrainingError
from launcher.node import all_reduce_round, speeds
from launcher.node.all_reduce_round import Groups, answer_of, left_of, num_workers
from launcher.node.speeds import Speeds
from launcher.runs.run_dir import node_name
from launcher.system import network, processes
from launcher.system.files import write_json_atomic
from launcher.system.waiting import is_listed, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from launcher.plan.launch_plan import LaunchPlan

REDUCE_S = 60.0
"""Seconds that a group gets for its all-reduce."""
WAIT_S = 300.0
"""Seconds to wait for the files of the other nodes, which may start at different times."""
MIN_FREE_GB = 2.0
SPEEDS = "speeds.json"
UNMEASURED = {"within_gb_s": None, "between_gb_s": None, "slow": ""}
SAME = ("torch", "launcher", "cuda", "nccl")
"""Versions that must be the same on all nodes."""
DISK = "/tmp"  # noqa: S108  the node's own disk is meant


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts that a node writes about itself."""

    host: str
    """Its name."""
    address: str
    """Where the other nodes reach it."""
    port: int
    """A free one there."""
    torch: str
    """Version."""
    launcher: str
    """Version."""
    cuda: str | None
    """Runtime that torch was built for."""
    nccl: str | None
    """Version that torch brings."""
    driver: str | None
    """NVIDIA's, or None."""
    num_gpus: int
    """GPUs that torch sees."""
    free_gb: float
    """Free space on the node's own disk."""
    fabric_gb_s: float = 0.0
    """GB/s that a port of its InfiniBand can carry; 0: it has none."""


def gather(plan: LaunchPlan, *, seed: int) -> Facts:
    """Look at this node."""
    with processes.importing():
        torch = importlib.import_module("torch")
    cuda = plan.device == "cuda"
    num_gpus = _num_gpus() if cuda else 0
    nccl = torch.cuda.nccl.version() if num_gpus else None
    return Facts(
        host=node_name(),
        address=plan.address,
        port=network.free_port(seed),
        torch=torch.__version__,
        launcher=__version__,
        cuda=torch.version.cuda,
        nccl=".".join(map(str, nccl)) if nccl else None,
        driver=_driver() if cuda else None,
        num_gpus=num_gpus,
        free_gb=shutil.disk_usage(DISK).free / 1e9,
        fabric_gb_s=speeds.fabric_gb_s(),
    )


def _num_gpus() -> int:
    """GPUs that torch sees. A child asks: CUDA works in no process that was forked from one that has touched it."""
    import torch

    from launcher.engine.tuning.child import OutOfMemoryError, TooSlowError, call_in_child

    try:
        return int(call_in_child(torch.cuda.device_count, timeout_s=REDUCE_S, heed_stop=lambda: None))
    except (TooSlowError, OutOfMemoryError, TrainingError):  # a driver that hangs, or ends whoever asks it
        return 0


def _driver() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=REDUCE_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None


def find_problems(facts: Sequence[Facts], plan: LaunchPlan) -> dict[int, str]:
    """Problems of single nodes, by node rank; if versions differ, the less frequent one is wrong."""
    problems = {}
    for rank, node in enumerate(facts):
        for name in SAME:
            values = [getattr(other, name) for other in facts]
            most = max(values, key=values.count)
            if getattr(node, name) != most:
                problems[rank] = f"{name} is {getattr(node, name)}, elsewhere {most}"
        if plan.device == "cuda" and node.num_gpus < plan.procs_per_node:
            problems[rank] = f"torch sees {node.num_gpus} GPUs of {plan.procs_per_node} (driver {node.driver})"
        if node.free_gb < MIN_FREE_GB:
            problems[rank] = f"{node.free_gb:.1f} GB are free in {DISK}; {MIN_FREE_GB:g} GB are the least"
    return problems


def find_bad(num: int, attempt: Callable[[Groups], list[bool]]) -> list[int] | None:
    """Which of ``num`` nodes keep an all-reduce over all of them from working, by halves.

    Groups that fail are halved and try again, all at the same time; who is left in doubt tries with one that worked.
    That is some log2(num) + 2 rounds.

    Args:
        num: how many nodes there are.
        attempt: has groups try; says of each whether it worked.

    Returns:
        The bad ones; None where all together fail and no single one can be blamed.
    """
    groups: Groups = [list(range(num))]
    good: list[int] = []
    doubtful: list[int] = []
    failed_once = False
    while groups:
        outcomes = list(zip(groups, attempt(groups), strict=True))
        groups = []
        for group, worked in outcomes:
            failed_once |= not worked
            if worked:
                good += group
            elif len(group) <= 2:  # noqa: PLR2004  a pair cannot be told apart by itself
                doubtful += group
            else:
                halves = (group[: len(group) // 2], group[len(group) // 2 :])
                doubtful += [half[0] for half in halves if len(half) == 1]  # alone it would prove nothing
                groups += [half for half in halves if len(half) > 1]
    if not doubtful:
        return None if failed_once else []
    if not good:
        alone = attempt([[node] for node in doubtful])
        return [node for node, ok in zip(doubtful, alone, strict=True) if not ok] or None
    bad = []
    while doubtful:
        some, doubtful = doubtful[: len(good)], doubtful[len(good) :]
        outcome = attempt([[partner, node] for partner, node in zip(good, some, strict=False)])
        tried = list(zip(some, outcome, strict=True))
        bad += [node for node, ok in tried if not ok]
        good += [node for node, ok in tried if ok]  # each helps to tell another one
    return sorted(bad) or None


def run(folder: Path, plan: LaunchPlan, *, seed: int, heed: Callable[[], None]) -> dict[str, str]:
    """Check all nodes of a job; every node calls this. Returns the problems, by host.

    Args:
        folder: of this start of the job, in the run directory.
        plan: as this node carries it out, with its address.
        seed: for the port.
        heed: called again and again while this node waits for others; what it raises ends the check.

    Raises:
        PreflightError: a node was not heard of, or (on node 0) no single one can be blamed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / f"node-{plan.node_rank}.json", asdict(gather(plan, seed=seed)))
    files = [folder / f"node-{rank}.json" for rank in range(plan.nodes)]
    missing = _wait(files, WAIT_S, heed, "the other nodes to be checked")
    if missing:
        ranks = ", ".join(file.stem.removeprefix("node-") for file in missing)
        raise PreflightError(f"nothing was heard of node {ranks} in {WAIT_S:g} s: does it see {folder}?")
    facts = [Facts(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    if plan.node_rank == 0:
        return _lead(folder, facts, plan, heed)
    return _take_part(folder, facts, plan, heed)


def read_facts(folder: Path) -> list[dict[str, Any]]:
    """The facts of all nodes, in the order of their ranks, and what was measured: within_gb_s, between_gb_s, slow."""
    files = sorted(folder.glob("node-*.json"), key=lambda file: int(file.stem.removeprefix("node-")))
    facts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    measured = [UNMEASURED] * len(facts)
    if (folder / SPEEDS).exists():
        measured = json.loads((folder / SPEEDS).read_text(encoding="utf-8"))
    return [one | more for one, more in zip(facts, measured, strict=True)]


def _lead(folder: Path, facts: Sequence[Facts], plan: LaunchPlan, heed: Callable[[], None]) -> dict[str, str]:
    rounds = 0
    results: dict[int, dict[str, Any]] = {}
    """Of the last round, by node."""

    def attempt(groups: Groups) -> list[bool]:
        nonlocal rounds
        rounds += 1
        write_json_atomic(folder / f"round-{rounds}.json", {"groups": groups})
        _reduce(folder, rounds, groups, facts, plan, heed)
        files = {node: answer_of(folder, rounds, node) for group in groups for node in group}
        missing = _wait(list(files.values()), REDUCE_S, heed, "the other nodes to try an all-reduce")
        left = [left_of(folder, rounds, node) for node, file in files.items() if file not in missing]
        _wait(left, REDUCE_S, heed, "the other nodes to end their part of it")  # else the next round meets this one's
        results.clear()
        results.update({node: json.loads(file.read_text()) if file.exists() else {} for node, file in files.items()})
        return [all(results[node].get("ok") for node in group) for group in groups]

    problems = find_problems(facts, plan)
    unclear = False
    if not problems and len(facts) * num_workers(plan) > 1:
        bad = find_bad(len(facts), attempt)
        unclear = bad is None
        problems = dict.fromkeys(bad or [], "an all-reduce with it does not work")
        if bad == []:
            _measure(folder, facts, results, attempt)
    found = {facts[rank].host: text for rank, text in problems.items()}
    write_json_atomic(folder / f"round-{rounds + 1}.json", {"found": found, "unclear": unclear})
    if unclear:
        raise PreflightError(_UNCLEAR)
    return found


def _measure(
    folder: Path,
    facts: Sequence[Facts],
    results: Mapping[int, Mapping[str, Any]],
    attempt: Callable[[Groups], list[bool]],
) -> None:
    """Have neighbours measure the links between them; write down and say how fast all are.

    Args:
        folder: of the check.
        facts: of all nodes.
        results: of the last round; of the one in which all took part, when this is called.
        attempt: makes a round.
    """
    found = Speeds(within=[results[node].get("within_gb_s") for node in range(len(facts))])
    for groups in speeds.rounds_of_pairs(len(facts)):
        if len(facts) > len(groups[0]):  # else that round is done
            attempt(groups)
        for pair in groups:
            measured = [results[node].get("all_gb_s") or 0.0 for node in pair]
            found.links[pair[0], pair[1]] = min(measured)  # 0: they do not get on without the others
    hosts = [node.host for node in facts]
    slow = speeds.find_slow(found, hosts, [node.fabric_gb_s for node in facts])
    rows = [
        {"within_gb_s": within, "between_gb_s": found.between(node), "slow": slow.get(node, "")}
        for node, within in enumerate(found.within)
    ]
    write_json_atomic(folder / SPEEDS, rows)
    for line in speeds.summary(found, hosts, slow):
        print(line, flush=True)


_UNCLEAR = (
    "an all-reduce over all nodes does not work, and no single node can be blamed: look at the network between them"
)


def _take_part(folder: Path, facts: Sequence[Facts], plan: LaunchPlan, heed: Callable[[], None]) -> dict[str, str]:
    number = 0
    while True:
        number += 1
        file = folder / f"round-{number}.json"
        if _wait([file], WAIT_S, heed, f"node 0 ({facts[0].host}) to say what comes next in the check of the nodes"):
            raise PreflightError(f"{file}: not there after {WAIT_S:g} s; {facts[0].host} writes it")
        said = json.loads(file.read_text(encoding="utf-8"))
        if "found" in said:
            return {"*": _UNCLEAR} if said["unclear"] else dict(said["found"])
        _reduce(folder, number, said["groups"], facts, plan, heed)


def _reduce(
    folder: Path,
    number: int,
    groups: Groups,
    facts: Sequence[Facts],
    plan: LaunchPlan,
    heed: Callable[[], None],
) -> None:
    endpoints = [network.join(node.address, node.port) for node in facts]
    all_reduce_round.take_part(folder, number, groups, endpoints, plan, timeout_s=REDUCE_S, heed=heed)


def _wait(files: Sequence[Path], timeout_s: float, heed: Callable[[], None], what: str) -> list[Path]:
    """Wait until all files are there; return those that are not in time."""

    def missing() -> list[Path]:
        return [file for file in files if not is_listed(file)]

    wait_until(lambda: not missing(), timeout_s=timeout_s, heed=heed, what=what)
    return missing()
