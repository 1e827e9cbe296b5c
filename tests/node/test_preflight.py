from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import PreflightError
from launcher.node import all_reduce_round, preflight, speeds
from launcher.node.preflight import Facts, find_bad, find_problems
from launcher.node.speeds import Speeds
from launcher.plan.launch_plan import LaunchPlan
from launcher.system import processes
from tests import warm

NODE = Facts(
    host="n1",
    address="10.0.0.1",
    port=20000,
    torch="2.14.1",
    launcher="1",
    cuda="13.0",
    nccl="2.29",
    driver="580",
    num_gpus=8,
    free_gb=100.0,
)
PLAN = LaunchPlan(run_id="a", name="a", device="cuda", procs_per_node=8, nodes=3, address="10.0.0.1")


def network_with(bad, *, alone=False):
    """Groups work in which no bad node is, or only one; ``alone``: a bad node does not even work by itself."""
    rounds = []

    def attempt(groups):
        rounds.append(groups)
        nodes = [node for group in groups for node in group]
        assert len(nodes) == len(set(nodes))  # nobody is asked to do two things at once
        return [not bad.intersection(group) or (len(group) == 1 and not alone) for group in groups]

    return attempt, rounds


@given(num=st.integers(3, 200), data=st.data(), alone=st.booleans())
def test_the_bad_nodes_are_found_by_halves(num, data, alone):
    bad = data.draw(st.sets(st.integers(0, num - 1), max_size=3))
    attempt, rounds = network_with(bad, alone=alone)
    found = find_bad(num, attempt)
    if found is None:  # no two nodes worked together that could vouch for the rest
        assert not any(ok for groups in rounds for ok in [not bad.intersection(g) for g in groups if len(g) > 1])
    else:
        assert found == sorted(bad)
    assert len(rounds) <= math.ceil(math.log2(num)) + 3


def test_one_round_is_enough_where_all_is_well():
    attempt, rounds = network_with(set())
    assert find_bad(1024, attempt) == []
    assert len(rounds) == 1


@pytest.mark.parametrize(("alone", "found"), [(True, [1]), (False, None)])
def test_of_two_nodes_one_is_blamed_only_if_it_fails_alone(alone, found):
    attempt, _ = network_with({1}, alone=alone)
    assert find_bad(2, attempt) == found


def test_where_only_all_together_fail_nobody_is_blamed():
    assert find_bad(8, lambda groups: [len(group) <= 4 for group in groups]) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"torch": "2.9.0"}, "torch is 2.9.0, elsewhere 2.14.1"),
        ({"nccl": None}, "nccl is None, elsewhere 2.29"),
        ({"num_gpus": 7}, "torch sees 7 GPUs of 8 (driver 580)"),
        ({"free_gb": 0.5}, "0.5 GB are free in /tmp; 2 GB are the least"),
    ],
)
def test_the_odd_node_out_is_named(changes, problem):
    facts = [NODE, dataclasses.replace(NODE, **changes), NODE]
    assert find_problems(facts, PLAN) == {1: problem}
    assert find_problems([NODE] * 3, PLAN) == {}


def heed():
    """Nobody asks to stop."""


def as_node(folder, rank, nodes, fault, answers):
    preflight.REDUCE_S, preflight.WAIT_S, preflight.MIN_FREE_GB = 120.0, 150.0, 0.0
    from launcher.engine import allreduce

    allreduce.SIZES_MIB, allreduce.MEASURE_S = {"cpu": (1, 8)}, 0.05
    if fault == rank:
        allreduce.all_reduce = lambda *_: 1 / 0
    plan = LaunchPlan(run_id="a", nodes=nodes, node_rank=rank, procs_per_node=9, device="cpu", address="127.0.0.1")
    try:
        answers.put((rank, preflight.run(folder, plan, seed=7000 + rank * 50, heed=heed)))
    except PreflightError as error:
        answers.put((rank, str(error)))


@pytest.fixture
def check(tmp_path):
    """Check nodes of two workers each, for each of which a process stands, with real gloo groups between them."""

    def call(num, *, fault=None, target=as_node):
        answers = warm.context.Queue()
        nodes = [
            warm.context.Process(target=target, args=(tmp_path / "p", rank, num, fault, answers)) for rank in range(num)
        ]
        for node in nodes:
            node.start()
        found = dict(answers.get(timeout=200) for _ in nodes)
        for node in nodes:
            node.join()
        return found, preflight.read_facts(tmp_path / "p")

    return call


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_workers_of_all_nodes_take_part_and_their_speeds_are_told(check, tmp_path):
    found, facts = check(3)
    assert found == {rank: {} for rank in range(3)}
    assert all(node["within_gb_s"] > 0 and node["between_gb_s"] > 0 for node in facts)
    rounds = [json.loads((tmp_path / "p" / f"round-{number}.json").read_text()) for number in (1, 2, 3, 4)]
    assert [one["groups"] for one in rounds] == [[[0, 1, 2]], [[0, 1]], [[1, 2]], [[2, 0]]]
    assert not list((tmp_path / "p").glob("*-failed-*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nodes_agree_on_which_of_them_is_bad(check):
    found, facts = check(4, fault=2)
    assert len(found) == 4
    assert all(list(answer.values()) == ["an all-reduce with it does not work"] for answer in found.values())
    assert {node["within_gb_s"] for node in facts} == {None}


def test_nobody_leaves_before_all_have_answered(tmp_path, monkeypatch):
    """The first is done at once; the second still needs its connections."""
    from launcher.engine import allreduce

    def all_reduce(_endpoint, rank, *_others, tell):
        pid = tmp_path / "pid"
        if rank == 0:
            pid.write_text(str(os.getpid()))
            tell.send({"all_gb_s": 5.0})
        else:
            while not all_reduce_round.answer_of(tmp_path, 1, 0).exists():
                time.sleep(0.05)
            time.sleep(1.5)
            tell.send({"all_gb_s": 4.0 if processes.start_time(int(pid.read_text())) else 0.0})
        time.sleep(1000)

    monkeypatch.setattr(allreduce, "all_reduce", lambda *arguments: all_reduce(*arguments[:-1], tell=arguments[-1]))
    fork = multiprocessing.get_context("fork")

    def as_first_or_second(rank):
        plan = LaunchPlan(run_id="a", nodes=2, node_rank=rank, device="cpu")
        all_reduce_round.take_part(tmp_path, 1, [[0, 1]], ["", ""], plan, timeout_s=90.0, heed=heed)

    nodes = [fork.Process(target=as_first_or_second, args=(rank,)) for rank in (0, 1)]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(150)
    answers = [json.loads(all_reduce_round.answer_of(tmp_path, 1, rank).read_text()) for rank in (0, 1)]
    assert [(one["ok"], one["all_gb_s"]) for one in answers] == [(True, 5.0), (True, 4.0)]
    assert processes.start_time(int((tmp_path / "pid").read_text())) is None


def as_node_that_lingers(folder, rank, nodes, fault, answers):
    """Node 2 keeps its processes of a round, which hold its port, for a while after all have answered."""
    preflight.node_name = lambda: f"n{rank}"
    kill = multiprocessing.process.BaseProcess.kill
    if rank == 2:
        multiprocessing.process.BaseProcess.kill = lambda process: (time.sleep(2), kill(process))
    as_node(folder, rank, nodes, fault, answers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_round_does_not_meet_the_processes_of_the_one_before(check):
    """Node 0, which is well, would be taken for bad with node 1: its partner's port answers for the round before."""
    found, _ = check(4, fault=1, target=as_node_that_lingers)
    assert list(found.values()) == [{"n1": "an all-reduce with it does not work"}] * 4


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 8, 33])
def test_each_node_meets_both_neighbours_one_at_a_time(num):
    rounds = speeds.rounds_of_pairs(num)
    for groups in rounds:
        nodes = [node for pair in groups for node in pair]
        assert len(nodes) == len(set(nodes))
    links = {frozenset(pair) for groups in rounds for pair in groups}
    assert links == {frozenset((node, (node + 1) % num)) for node in range(num) if num > 1}
    assert len(rounds) <= 3


HOSTS = ["a", "b", "c", "d"]
EVEN = {(0, 1): 10.0, (2, 3): 11.0, (1, 2): 10.5, (3, 0): 9.0}


@pytest.mark.parametrize(
    ("within", "links", "fabrics", "said"),
    [
        ([None] * 4, EVEN, [0.0] * 4, {}),
        ([200.0, 210.0, 80.0, 205.0], EVEN, [0.0] * 4, {2: "80.0 GB/s between its own workers"}),
        ([None] * 4, EVEN | {(2, 3): 1.0, (3, 0): 1.5}, [0.0] * 4, {3: "1.0 GB/s to c; the median of"}),
        ([None] * 4, EVEN | {(1, 2): 1.0}, [0.0] * 4, {1: "1.0 GB/s to c; the median of the nodes is 11.0"}),
        ([None] * 3, {(0, 1): 10.0, (1, 2): 1.0, (2, 0): 1.1}, [0.0] * 3, {2: "1.0 GB/s to b"}),
        ([None] * 2, {(0, 1): 1.2}, [0.0] * 2, {}),  # there is nothing to compare it with
        ([None] * 2, {(0, 1): 1.2}, [25.0, 25.0], {0: "its InfiniBand can carry 25", 1: "NET/IB"}),
        ([None] * 2, {(0, 1): 12.0}, [25.0, 25.0], {}),
        ([None] * 4, EVEN | {(1, 2): 0.0}, [0.0] * 4, {1: "0.0 GB/s to c"}),
        ([230.0], {}, [25.0], {}),
    ],
)
def test_a_slow_node_or_link_is_told_against_the_median(within, links, fabrics, said):
    found = speeds.find_slow(Speeds(within=within, links=links), HOSTS[: len(within)], fabrics)
    assert found.keys() == said.keys()
    assert all(text in found[node] for node, text in said.items()), found


def test_what_a_user_is_told_of_speeds():
    measured = Speeds(within=[230.0, 228.0], links={(0, 1): 1.2})
    assert speeds.summary(measured, ["a", "b"], {1: "1.2 GB/s to a"}) == [
        "check of the nodes: within a node 228.0 to 230.0 GB/s, between nodes 1.2 GB/s (all-reduce, bus bandwidth)",
        "warning: slow: b: 1.2 GB/s to a",
    ]
    assert speeds.summary(Speeds(within=[None]), ["a"], {}) == []


def test_infiniband_is_as_fast_as_the_fastest_port_that_is_active(tmp_path):
    for card, state, rate in (
        ("mlx5_0", "4: ACTIVE", "200 Gb/sec (4X HDR)"),
        ("mlx5_1", "1: DOWN", "400 Gb/sec (4X NDR)"),
    ):
        port = tmp_path / f"sys/class/infiniband/{card}/ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text(f"{rate}\n")
    assert speeds.fabric_gb_s(tmp_path) == 25.0
    assert speeds.fabric_gb_s(tmp_path / "none") == 0.0


def test_a_node_that_is_not_heard_of_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "WAIT_S", 0.5)
    monkeypatch.setattr(preflight, "gather", lambda *_, **__: NODE)
    with pytest.raises(PreflightError, match=r"nothing was heard of node 1, 2 in 0.5 s: does it see "):
        preflight.run(tmp_path / "p", PLAN, seed=1, heed=heed)
