"""Nodes that are started by hand meet before any worker starts: through small files in the run directory they share.

Each says what it was given and how it reaches the others. Node 0 compares; what cannot work ends all of them at once
with the same words, where the workers would wait for each other in silence.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError
from launcher.node import signals
from launcher.node.elastic import presence
from launcher.node.elastic.deciding import START_S
from launcher.runs import states
from launcher.runs.generations import Generations
from launcher.runs.run_dir import RunDir
from launcher.system import network
from launcher.system.files import write_json_atomic
from launcher.system.waiting import is_listed, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from launcher.plan.launch_plan import LaunchPlan

WAIT_S = 900
"""How long node 0 waits for the others to be started."""
WAIT_FOR_RUN_DIR_S = 600
SAME = {"nodes": "--nodes", "min_nodes": "the least of --nodes", "procs_per_node": "--procs (or --gpus)"}
"""What every node must be given alike, with its flag."""
OF_A_NODE = ("launch.nodes", "launch.gpus", "launch.procs", "launch.backend", "launch.profile")
"""Keys of the recipe by which nodes may differ, or which ``SAME`` is about."""
LOOPBACK_NAMES = ("localhost", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
"""Names that every machine has for itself; its host name may stand for a loopback address too (Debian: 127.0.1.1)."""


def check(endpoint: str, *, node_rank: int) -> None:
    """Look before anything is written whether the nodes can meet at an endpoint, as far as this one can know.

    Raises:
        UsageError: they cannot; says what would do.
    """
    host, port = network.split(endpoint)
    flag = f"--rdzv-endpoint {endpoint}"
    try:
        address = network.resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"{flag}: this machine finds no address of {host} ({getattr(error, 'strerror', None) or error}); "
            "give a name that all nodes know, or node 0's address (`hostname -I` there prints it)"
        ) from None
    if address in ("0.0.0.0", "::"):  # noqa: S104  not bound to: refused
        where = _own_addresses() if node_rank == 0 else "`hostname -I` there prints it"
        raise UsageError(f"{flag}: stands for any address; give node 0's own ({where})")
    if node_rank != 0:
        try:
            network.local_address(host, port)
        except OSError as error:
            raise UsageError(f"{flag}: there is no way from this machine to {address}: {error.strerror}") from None
        return
    if not network.is_own(address):
        raise UsageError(
            f"{flag}: {host} is not this machine, which has --node-rank 0; the nodes meet at node 0: give its name or "
            f"address on all of them ({_own_addresses()}), or start node 0 on {host}"
        )
    try:
        network.try_port(port)
    except OSError as error:
        free = network.free_port(os.getpid())
        raise UsageError(
            f"{flag}: port {port} cannot be had on this machine ({error.strerror}); give another one on all nodes, "
            f"such as {free}, which is free here"
        ) from None


def _own_addresses() -> str:
    found = network.interfaces().items()
    others = [f"{address} ({name})" for name, address in found if not network.is_loopback(address)]
    return f"this machine's: {', '.join(others) or 'none but loopback'}"


def wait_for_run(path: str) -> RunDir:
    """The run directory, which node 0 makes on the file system that all nodes share.

    Raises:
        UsageError: it has not come.
    """
    run = RunDir(path)
    signals.hold()
    what = f"node 0 to make {path}"
    heed = functools.partial(signals.heed, f"waiting for {what}")

    def is_made() -> bool:
        return is_listed(run.plan) and is_listed(run.recipe)

    if not wait_until(is_made, timeout_s=WAIT_FOR_RUN_DIR_S, heed=heed, what=what):
        raise UsageError(
            f"{path}: not there after {WAIT_FOR_RUN_DIR_S} s; node 0 makes it: is it started, and is the folder "
            "on a file system that all nodes share?"
        )
    return run


def meet(run: RunDir, plan: LaunchPlan, *, heed_stop: Callable[[], None]) -> LaunchPlan:
    """Wait until all nodes are there and agree; return the run's plan with this node's own address and interface.

    Args:
        run: the run directory.
        plan: as this node was given it.
        heed_stop: called all the while; raises where a stop was asked for.

    Raises:
        UsageError: they do not agree, or a node has not come; the same on all of them.
    """
    is_first = plan.node_rank == 0 and not goes_on_elsewhere(run, plan)
    mine = _describe(plan)
    run.meetings.mkdir(exist_ok=True)
    verdict = _lead(run, plan, mine, heed_stop) if is_first else _join(run, mine, plan.node_rank, heed_stop)
    if mine["start"] not in verdict["starts"] and plan.is_elastic:
        if mine["recipe"] == _given_recipe(replace(plan, recipe=_recipe_of(run))):
            mine["recipe"] = None
        verdict["problems"] = find_problems([verdict["first"], mine])
    if verdict["problems"]:
        raise UsageError("\n".join(["the nodes cannot work together; no worker was started", *verdict["problems"]]))
    address = verdict["address"] if is_first else mine["address"]
    at = network.join(address, mine["port"]) if is_first else mine["rdzv_endpoint"]
    interface = network.interface_of(address)
    env = network.interface_environment(interface, address) if interface else {}
    agreed = run.read_plan()  # node 0 may have written it anew since this node was started
    return replace(
        agreed,
        run_dir=plan.run_dir,
        node_rank=plan.node_rank,
        rdzv_endpoint=at,
        address=address,
        env=agreed.env | env,
        members=tuple(verdict["nodes"]),
    )


def goes_on_elsewhere(run: RunDir, plan: LaunchPlan) -> bool:
    """Whether other nodes carry a run out now that this one can join, as where it was lost.

    Raises:
        UsageError: this node does so already.
    """
    if not (plan.is_elastic and run.exists):
        return False
    generations = Generations.by_hand(run)
    living, newest = presence.living_nodes(generations), generations.newest()
    if plan.node_rank in living:
        raise UsageError(
            f"{run}: node {plan.node_rank} takes part in this run already; give another --node-rank, or end that one"
        )
    return newest is not None and any(newest.index(word.start) is not None for word in living.values())


def leave(run: RunDir) -> None:
    """Have no node that is started later take an earlier meeting for its own; a refusal stays for who is to read it."""
    with contextlib.suppress(OSError):  # there was no meeting, as in a job; or a disk that is full
        if not json.loads(run.meeting_by_hand.read_text(encoding="utf-8"))["problems"]:
            run.meeting_by_hand.unlink()


def _describe(plan: LaunchPlan) -> dict[str, Any]:
    """What a node says of itself."""
    host, port = network.split(plan.rdzv_endpoint)
    there = network.resolve(host, port)
    is_own = network.is_own(there)
    names_itself = is_own if plan.node_rank else _names_loopback(host, there)
    return {
        "start": uuid.uuid4().hex,
        "rank": plan.node_rank,
        "host": os.uname().nodename,
        "machine": network.machine(),
        "rdzv_endpoint": plan.rdzv_endpoint,
        "port": port,
        "names_itself": names_itself,
        "address": there if is_own else network.local_address(host, port),
        "recipe": _given_recipe(plan),
        "unknown": network.unknown_interfaces(os.environ),
        **{key: getattr(plan, key) for key in SAME},
    }


def _given_recipe(plan: LaunchPlan) -> dict[str, str] | None:
    """The recipe that this node was given, each value as YAML; None: it was given none, and reads the run's."""
    from launcher.recipe import load as recipes
    from launcher.recipe import paths
    from launcher.recipe.keys import flat, show

    if not plan.recipe:
        return None
    recipe = paths.absolute(recipes.from_dict(plan.recipe))
    return {key: show(value) for key, value in flat(recipe) if key not in OF_A_NODE}


def _recipe_of(run: RunDir) -> dict[str, Any]:
    """The run's, as `launch resume` gives it to a node."""
    import yaml

    recipe: dict[str, Any] = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    return recipe


def _names_loopback(host: str, address: str) -> bool:
    """Whether node 0's endpoint is one that each machine takes for itself, and not its own name."""
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError:
        return host.lower().partition(".")[0] in LOOPBACK_NAMES
    return network.is_loopback(address)


def find_problems(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What keeps nodes from working together, by what each says of itself; node 0 first."""
    first, *others = nodes
    problems = []
    elsewhere = [node for node in others if node["machine"] != first["machine"]]
    if elsewhere and first["names_itself"]:
        problems.append(
            f"node 0 ({first['host']}) was given --rdzv-endpoint {first['rdzv_endpoint']}, by which each machine "
            f"reaches only itself, and {elsewhere[0]['host']} is another machine: give a name or address of "
            f"{first['host']} that all nodes reach"
        )
    problems += [
        f"node {node['rank']} ({node['host']}) was given --rdzv-endpoint {node['rdzv_endpoint']}, which is "
        f"{node['host']} itself, and node 0 runs on {first['host']}: give a name or address by which "
        f"{node['host']} reaches {first['host']}"
        for node in elsewhere
        if node["names_itself"]
    ]
    problems += [f"node {node['rank']} ({node['host']}): {text}" for node in nodes for text in node.get("unknown", [])]
    for node in others:
        for key, flag in (*SAME.items(), ("port", "the port of --rdzv-endpoint")):
            if node.get(key) != first.get(key):
                problems.append(
                    f"{flag} is {node[key]} on node {node['rank']} ({node['host']}) and {first[key]} on node 0 "
                    f"({first['host']}): give all nodes the same"
                )
        problems += _other_recipe(first, node)
    return problems


def _other_recipe(first: Mapping[str, Any], node: Mapping[str, Any]) -> list[str]:
    """By what a node's recipe differs from that of node 0, which is the run's: it would be ignored."""
    run, given = first.get("recipe"), node.get("recipe")
    if not run or not given:
        return []
    return [
        f"{key} is {given.get(key)} on node {node['rank']} ({node['host']}) and {value} on node 0 ({first['host']}): "
        "give all nodes the same recipe and overrides"
        for key, value in run.items()
        if given.get(key) != value
    ]


def _lead(run: RunDir, plan: LaunchPlan, mine: dict[str, Any], heed_stop: Callable[[], None]) -> dict[str, Any]:
    """Wait for the other nodes, and write down for all of them what has come of it."""
    created = run.read_launched().created
    found: dict[int, dict[str, Any]] = {}
    came = time.monotonic()

    def missing() -> str:
        return ", ".join(str(rank) for rank in range(1, plan.nodes) if rank not in found)

    def all_are_there() -> bool:
        nonlocal came
        for rank in range(1, plan.nodes):
            if rank not in found and is_listed(run.node_by_hand(rank)):
                node = json.loads(run.node_by_hand(rank).read_text(encoding="utf-8"))
                if node["created"] == created:
                    found[rank], came = node, time.monotonic()
        has_waited = plan.is_elastic and time.monotonic() - came > START_S
        return not missing() or (has_waited and len(found) + 1 >= plan.fewest_nodes)

    is_whole = wait_until(
        all_are_there,
        timeout_s=WAIT_S,
        heed=heed_stop,
        what=lambda: (
            f"node {missing()} to come to {mine['rdzv_endpoint']} ({len(found) + 1} of {plan.nodes} are there)"
        ),
        cure="run the same command there, with its --node-rank",
    )
    nodes = [mine, *(found[rank] for rank in sorted(found))]
    problems = find_problems(nodes)
    if not is_whole:
        problems.append(f"node {missing()} has not come in {WAIT_S} s: is it started, and does it see {run.path}?")
    address = ""
    try:
        address = _address_for(nodes)
    except OSError as error:
        problems.append(f"node 0 ({mine['host']}) has no way to the others: {error.strerror}")
    starts = [node["start"] for node in nodes]
    verdict = {"created": created, "starts": starts, "problems": problems, "address": address}
    verdict |= {"nodes": [node["rank"] for node in nodes], "first": mine}
    if problems:
        run.append_event("refused", message="; ".join(problems))
        states.move(run, "failed")
    write_json_atomic(run.meeting_by_hand, verdict)
    return verdict


def _address_for(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Node 0's address for the others; node 0 asks."""
    first, *others = nodes
    elsewhere = [node for node in others if node["machine"] != first["machine"]]
    if not elsewhere or not network.is_loopback(first["address"]):
        return str(first["address"])
    # Its own name stands for a loopback address, as on Debian: they reach it by the way to them.
    return network.local_address(elsewhere[0]["address"])


def _join(run: RunDir, mine: dict[str, Any], node_rank: int, heed_stop: Callable[[], None]) -> dict[str, Any]:
    """Say what this node has to say, and wait for node 0's verdict."""
    told: float | None = None
    verdict: dict[str, Any] = {}

    def is_decided() -> bool:
        nonlocal told, verdict
        created = run.read_launched().created  # node 0 may be started later, and then writes another
        if created != told:
            write_json_atomic(run.node_by_hand(node_rank), mine | {"created": created})
            told = created
        if is_listed(run.meeting_by_hand):
            verdict = json.loads(run.meeting_by_hand.read_text(encoding="utf-8"))
        generations = Generations.by_hand(run)
        if generations.end() or generations.stop():
            return False  # of a start that is over
        # A refusal may be of an earlier start; what was agreed holds for a node that is started again, too.
        meant = verdict and (not verdict["problems"] or mine["start"] in verdict["starts"])
        return bool(meant) and verdict["created"] == created

    awaited = f"node 0 to begin in {run}, when all nodes are there"
    if not wait_until(is_decided, timeout_s=WAIT_S, heed=heed_stop, what=awaited):
        raise UsageError(f"node 0 has not come in {WAIT_S} s: is it started, and does it see {run.path}?")
    return verdict
