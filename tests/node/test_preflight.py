from __future__ import annotations

import dataclasses
import math
import multiprocessing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import PreflightError
from launcher.node import preflight
from launcher.node.preflight import Facts, find_bad, find_problems
from launcher.plan.launch_plan import LaunchPlan

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
    preflight.REDUCE_S, preflight.WAIT_S = 5.0, 20.0
    if fault == rank:
        from launcher.engine import allreduce

        allreduce.all_reduce = lambda *_: 1 / 0
    plan = LaunchPlan(run_id="a", name="a", nodes=nodes, node_rank=rank, address="127.0.0.1")
    try:
        answers.put((rank, preflight.run(folder, plan, seed=7000 + rank * 50, heed=heed)))
    except PreflightError as error:
        answers.put((rank, str(error)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", [None, 2])
def test_nodes_agree_on_which_of_them_is_bad(tmp_path, fault):
    """Four processes stand for four nodes, with real gloo groups between them; they share one host name."""
    fork = multiprocessing.get_context("spawn")
    answers = fork.Queue()
    nodes = [fork.Process(target=as_node, args=(tmp_path / "p", rank, 4, fault, answers)) for rank in range(4)]
    for node in nodes:
        node.start()
    found = dict(answers.get(timeout=120) for _ in nodes)
    for node in nodes:
        node.join()
    if fault is None:
        assert found == {rank: {} for rank in range(4)}
    else:
        assert len(found) == 4
        assert all(list(answer.values()) == ["an all-reduce with it does not work"] for answer in found.values())


def test_a_node_that_is_not_heard_of_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "WAIT_S", 0.5)
    monkeypatch.setattr(preflight, "gather", lambda *_, **__: NODE)
    with pytest.raises(PreflightError, match=r"nothing was heard of node 1, 2 in 0.5 s: does it see "):
        preflight.run(tmp_path / "p", PLAN, seed=1, heed=heed)
