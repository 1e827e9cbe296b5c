"""Who goes on, whatever the network and the nodes do: properties of the pure decision."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.node.elastic import deciding
from launcher.node.elastic.deciding import View, decide, group
from launcher.node.elastic.presence import Word
from launcher.runs.generations import Generation, Member

LONG_S = 1000.0


def generation(*nodes, number=1):
    return Generation(
        number=number, members=tuple(Member(node=node, host=f"n{node}", start=f"s{node}") for node in nodes)
    )


def words(nodes, heard, number=1, ready=None):
    """What nodes say; ``heard`` holds pairs that hear each other."""
    return {
        node: Word(
            node=node,
            start=f"s{node}",
            generation=number,
            ready=ready is None or node in ready,
            hears=tuple(f"s{other}" for other in nodes if {node, other} in heard),
        )
        for node in nodes
    }


def view(own, said, last, *, fewest=1, most=9, waited_s=LONG_S, **changes):
    others = {node: word for node, word in said.items() if node != own}
    found = View(
        own=said[own], others=others, last=last, fewest=fewest, most=most, waited_s=waited_s, unchanged_s=waited_s
    )
    return replace(found, **changes)


def nodes_of(found):
    return [word.node for word in found]


@st.composite
def situations(draw):
    members = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6, unique=True))
    living = draw(st.lists(st.integers(0, 6), min_size=1, max_size=7, unique=True))
    pairs = [set(pair) for pair in combinations(living, 2)]
    heard = [pair for pair in pairs if draw(st.booleans())]
    ready = draw(st.sets(st.sampled_from(living), min_size=1))
    return generation(*members), words(living, heard, ready=ready), heard, ready


@given(situations(), st.integers(1, 4), st.integers(4, 6))
def test_who_goes_on_hears_each_other_is_ready_and_enough_and_the_first_of_them_decides(situation, fewest, most):
    last, said, heard, ready = situation
    decisions = {own: decide(view(own, said, last, fewest=fewest, most=most)) for own in ready}
    for own, found in decisions.items():
        nodes = nodes_of(found)
        assert not nodes or (nodes[0] == own and fewest <= len(nodes) <= most)
        assert set(nodes) <= ready
        assert all({one, other} in heard for one, other in combinations(nodes, 2))
        kept = [node for node in nodes if node in last.nodes]
        assert kept == sorted(kept, key=last.nodes.index)  # members keep their order, and come first
        assert nodes[: len(kept)] == kept


@given(st.sets(st.integers(0, 6), min_size=1), st.integers(1, 7))
def test_where_all_hear_each_other_just_one_decides_and_all_that_are_ready_go_on(living, fewest):
    last = generation(2, 0, 5)
    said = words(sorted(living), [set(pair) for pair in combinations(living, 2)])
    found = [decide(view(own, said, last, fewest=fewest)) for own in living]
    assert sum(map(bool, found)) == (len(living) >= fewest)
    assert all(set(nodes_of(one)) == living for one in found if one)


@given(st.integers(2, 7), st.data())
def test_of_two_parts_of_a_network_the_greater_is_first_and_of_halves_the_one_with_the_leader(num, data):
    """Both would go on in the end: whoever makes the file first does, and the other finds it."""
    last = generation(*range(num))
    part = data.draw(st.sets(st.integers(0, num - 1), min_size=1, max_size=num - 1))
    rest = set(range(num)) - part
    heard = [set(pair) for side in (part, rest) for pair in combinations(side, 2)]
    said = words(range(num), heard)
    first = part if (len(part), 0 in part) > (len(rest), 0 in rest) else rest
    second = rest if first is part else part
    for side, waited_s, decides in (
        (first, deciding.SETTLE_S, True),
        (second, deciding.SETTLE_S, False),
        (second, deciding.SETTLE_S + deciding.RIVAL_S, True),
    ):
        found = [decide(view(own, said, last, waited_s=waited_s)) for own in side]
        assert any(found) == decides


def all_hear(nodes):
    return [set(pair) for pair in combinations(nodes, 2)]


@pytest.mark.parametrize(
    ("alive", "ready", "after_s"),
    [
        ((0, 1, 2), (0, 1, 2), deciding.SETTLE_S),  # none is lost, and a fourth may come
        ((0, 1), (0, 1), deciding.SETTLE_S),  # the third is dead
        ((0, 1, 2), (0, 1), deciding.NOTICE_S),  # it lives, and has not noticed yet
        ((1, 2), (1, 2), deciding.SETTLE_S),  # the leader is dead
        ((3, 4), (3, 4), deciding.ALONE_S),  # all are dead, and two others waited
    ],
)
def test_how_long_nodes_wait_for_each_other(alive, ready, after_s):
    said = words(alive, all_hear(ready), ready=ready)
    (own, *_) = ready
    for waited_s, decides in ((after_s - 0.1, False), (after_s, True)):
        found = decide(view(own, said, generation(0, 1, 2), fewest=2, most=4, waited_s=waited_s))
        assert bool(found) == decides


def test_nodes_that_only_wait_take_nothing_from_one_that_trains_out_of_their_reach():
    said = words((0, 3, 4), all_hear((3, 4)), ready=(3, 4))
    assert decide(view(3, said, generation(0), fewest=1)) == ()


def test_at_the_start_all_that_are_expected_begin_at_once_and_some_wait_for_the_rest_from_the_last_one_that_came():
    last = generation(0, 1, 2, number=0)
    said = words((0, 1, 2), all_hear((0, 1, 2)), number=0)
    assert nodes_of(decide(view(0, said, last, fewest=2, most=3, waited_s=0.0))) == [0, 1, 2]
    some = words((0, 1), all_hear((0, 1)), number=0)
    for unchanged_s, decides in ((deciding.START_S - 0.1, False), (deciding.START_S, True)):
        found = decide(view(0, some, last, fewest=2, most=3, waited_s=100.0, unchanged_s=unchanged_s))
        assert bool(found) == decides


def test_a_spare_takes_the_place_of_a_lost_node_and_none_where_all_are_there():
    last = generation(0, 1)
    for alive, expected in (((0, 2), [0, 2]), ((0, 1, 2), [0, 1])):
        assert nodes_of(decide(view(0, words(alive, all_hear(alive)), last, fewest=2, most=2))) == expected


def test_a_node_that_was_lost_too_often_is_left_out_and_one_that_is_a_member_is_not():
    said = words((0, 1, 2), all_hear((0, 1, 2)))
    assert nodes_of(group(view(0, said, generation(0, 1), left_out={1, 2}))) == [0, 1]


def test_a_supervisor_that_was_started_again_is_another_one():
    said = words((0, 1), all_hear((0, 1)))
    last = Generation(number=1, members=(*generation(0).members, Member(node=1, host="n1", start="before")))
    assert decide(view(0, said, last, waited_s=deciding.SETTLE_S - 0.1)) == ()
    assert nodes_of(decide(view(0, said, last, waited_s=deciding.SETTLE_S))) == [0, 1]


def test_a_spare_node_that_not_all_have_said_to_hear_yet_is_waited_for_and_one_that_is_cut_off_is_not():
    nodes, last = (1, 2, 3), generation(0, 1, 2)
    said = words(nodes, [{1, 2}, {1, 3}])  # node 2 still tries the one that is lost
    said[3] = replace(said[3], hears=("s1", "s2"))
    soon, at_last = deciding.SETTLE_S + 0.5, deciding.HEAR_S
    assert decide(view(1, said, last, most=3, waited_s=soon)) == ()
    assert nodes_of(decide(view(1, said, last, most=3, waited_s=at_last))) == [1, 2]
    assert nodes_of(decide(view(1, said, last, most=2, waited_s=soon))) == [1, 2]  # there is no room for it
    heard = words(nodes, [{1, 2}, {1, 3}, {2, 3}])
    assert nodes_of(decide(view(1, heard, last, most=3, waited_s=soon))) == [1, 2, 3]
    cut_off = words(nodes, [{1, 2}])
    assert nodes_of(decide(view(1, cut_off, last, most=3, waited_s=soon))) == [1, 2]


def test_one_that_may_live_is_waited_for_until_it_is_known():
    """Its file is renewed every second, which takes a while to see, on NFS or on a machine that is busy."""
    last, said = generation(0, 1), words((0, 1, 2), all_hear((0, 1, 2)))
    both, own = view(0, words((0, 1), all_hear((0, 1))), last), view(0, words((0,), ()), last)
    training = replace(said[2], ready=False)
    for seen, unsure, decides in (
        (own, {1: replace(said[1], ready=False)}, False),  # a member that has not noticed yet
        (both, {2: said[2]}, False),  # a spare one, or one that comes back
        (both, {2: training}, True),  # of another start: dead, or it would have said that it waits
        (replace(both, most=2), {2: said[2]}, True),  # there is no room for it
        (replace(both, left_out={2}), {2: said[2]}, True),  # it would not be taken in
        (own, {}, True),
    ):
        assert bool(decide(replace(seen, unsure=unsure))) == decides
