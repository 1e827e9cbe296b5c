"""Who goes on: decided by each node alone, from what all say of themselves. Pure.

Several nodes may decide at the same time and differ, where some do not hear each other: the file of a generation is
made once (:mod:`launcher.runs.generations`), and who comes late takes what is there. What is here only makes the
better decision come first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from launcher.node.elastic.presence import Word
    from launcher.runs.generations import Generation

START_S = 20.0
"""At the start, when enough nodes are there: how long they wait for the rest, from the last one that came."""
SETTLE_S = 2.0
"""How long fewer than all nodes wait before they go on, so that all that are ready are seen and say whom they hear."""
HEAR_S = 10.0
"""How long they wait for one that is ready and of which not all have said yet that they hear it, or it them: whoever
tries a node that is cut off besides takes some seconds for that."""
NOTICE_S = 15.0
"""How long they wait for one that lives and has not noticed yet, or cannot end its workers."""
RIVAL_S = 10.0
"""How much longer the smaller part waits where a network fell in two and the other part lives."""
ALONE_S = 10.0
"""How long nodes that only wait to be taken in do so when none of those that trained is left."""
FLAPS, FLAP_S = 3, 600.0
"""A node that was lost so often in as many seconds, each time before another checkpoint, is not taken in."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What a node knows when it decides."""

    own: Word
    """What it says of itself."""
    others: Mapping[int, Word]
    """What those say that live."""
    last: Generation
    """The newest generation; before the first one its members are those that are expected."""
    fewest: int
    """Nodes of a generation, at least."""
    most: int
    """At most."""
    waited_s: float
    """How long this node has been ready."""
    unchanged_s: float
    """How long as many nodes were ready as are now."""
    left_out: Collection[int] = ()
    """Nodes that are not taken in."""
    unsure: Mapping[int, Word] = field(default_factory=dict)
    """What those say of which nobody can tell yet whether they live; for some seconds after this node began to look."""


def group(view: View) -> tuple[Word, ...]:
    """Those that could go on together with this node, first the leader: each of them hears each other one."""
    own, last = view.own, view.last
    found = [own]
    for word in sorted(_wanted(view), key=lambda word: _place(last, word)):
        if all(_hear_each_other(word, one) for one in found):
            found.append(word)
    found.sort(key=lambda word: _place(last, word))
    return tuple(found)


def _wanted(view: View) -> list[Word]:
    """The other nodes that are ready, and may be taken."""
    return [word for word in view.others.values() if _is_ready(view, word)]


def _is_ready(view: View, word: Word) -> bool:
    may_be_taken = _was_in(view.last, word) or word.node not in view.left_out
    return may_be_taken and word.ready and word.generation == view.last.number


def decide(view: View) -> tuple[Word, ...]:
    """The members of the next generation, if it is for this node to make it, and now; else none."""
    found = group(view)[: view.most]
    if len(found) < view.fewest or found[0].start != view.own.start or _may_be_more(view, found):
        return ()
    patience = _patience(view, found)
    if len(found) < view.most and _is_about_to_join(view, found):
        patience = max(patience, HEAR_S)
    return found if view.waited_s >= patience else ()


def _may_be_more(view: View, found: Sequence[Word]) -> bool:
    """Whether one that might go on too has not been watched for long enough to tell whether it lives."""
    if not view.last.number or len(found) == view.most:
        return False
    return any(_was_in(view.last, word) or _is_ready(view, word) for word in view.unsure.values())


def _is_about_to_join(view: View, found: Sequence[Word]) -> bool:
    """Whether another one is ready that hears one of those found, or is heard; one that is cut off is neither."""
    there = {word.start for word in found}
    others = [word for word in _wanted(view) if word.start not in there]
    return any(not there.isdisjoint(word.hears) or any(word.start in one.hears for one in found) for word in others)


def missing(view: View) -> tuple[int, ...]:
    """Nodes of the last generation that could not go on together with this one."""
    there = {word.node for word in group(view)}
    return tuple(node for node in view.last.nodes if node not in there)


def _patience(view: View, found: Sequence[Word]) -> float:
    """How long those that were found wait for others before they go on without them."""
    last = view.last
    there = {word.node for word in found if _was_in(last, word)}
    absent = set(last.nodes) - there
    if not absent:
        return SETTLE_S if len(found) < view.most else 0.0
    if not last.number:  # nobody has trained yet: the others may still be on their way
        return view.waited_s - view.unchanged_s + START_S
    rivals = [word for word in view.others.values() if word.node in absent and _was_in(last, word)]
    if not there:  # they only waited, and must take nothing from those that train, out of their reach
        return math.inf if rivals else ALONE_S
    if any(not word.ready for word in rivals):
        return NOTICE_S + (0.0 if _is_greater_part(last, there) else RIVAL_S)
    return SETTLE_S + (RIVAL_S if rivals and not _is_greater_part(last, there) else 0.0)


def _is_greater_part(last: Generation, there: Collection[int]) -> bool:
    """More than half of the last generation; of two halves the one with its leader."""
    num = sum(node in there for node in last.nodes)
    return 2 * num > len(last.nodes) or (2 * num == len(last.nodes) and last.nodes[0] in there)


def _was_in(last: Generation, word: Word) -> bool:
    """Whether this very supervisor was a member; before the first generation: whether its node is expected."""
    return word.node in last.nodes if not last.number else last.index(word.start) is not None


def _place(last: Generation, word: Word) -> tuple[int, int]:
    """Members in their order, then the others."""
    return (last.nodes.index(word.node), 0) if _was_in(last, word) else (len(last.nodes), word.node)


def _hear_each_other(one: Word, other: Word) -> bool:
    return one.start in other.hears and other.start in one.hears
