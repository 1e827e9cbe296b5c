"""Nodes that gather: real files, real connections, no workers."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest

from launcher.errors import TrainingError, UsageError
from launcher.node import meeting
from launcher.node.elastic import course as courses
from launcher.node.elastic import deciding, presence
from launcher.node.elastic.course import Course, EndedError, LeaderLostError, StoppedError
from launcher.node.elastic.usher import left_out
from launcher.node.signals import StopSignals
from launcher.plan.launch_plan import LaunchPlan
from launcher.runs import history
from launcher.runs.generations import Generation, Generations, Member
from launcher.system import waiting
from launcher.system.files import write_json_atomic

DEADLINE_S = 60


@pytest.fixture
def run(make_run):
    return make_run("run", state="running")


class Node:
    """A node's way through the generations, in a thread."""

    def __init__(self, run, node, nodes="2:3"):
        fewest, _, most = nodes.partition(":")
        plan = LaunchPlan(run_id="run", nodes=int(most), min_nodes=int(fewest), node_rank=node)
        plan = replace(plan, address="127.0.0.1", rdzv_endpoint="127.0.0.1:0")
        self.stop = StopSignals(run, node_rank=node, outlives_loss=True)
        self.course = Course(run, plan, self.stop, Generations(run, "start"), range(plan.nodes))
        self.came_to = None
        self.error = None

    def gather(self):
        """Wait for the next generation, beside others."""
        self.came_to = self.error = None
        self.thread = threading.Thread(target=self._gather, daemon=True)
        self.thread.start()

    def _gather(self):
        try:
            self.came_to = self.course.next()
        except Exception as error:
            self.error = error

    def lose(self, reason="node 9 (n9) is gone"):
        """The workers have ended, because another node is lost."""
        self.stop.request(reason=reason, cause="lost_node")
        assert self.course.goes_on()


@pytest.fixture
def nodes(run, monkeypatch):
    monkeypatch.setattr("launcher.system.processes.kill_descendants", lambda _spared: None)
    made = []

    def make(*numbers, of="2:3"):
        made.extend(Node(run, number, of) for number in numbers)
        for node in made[-len(numbers) :]:
            node.course.__enter__()
        return made[-len(numbers) :]

    yield make
    for node in made:
        node.course.__exit__()


def gather(*nodes):
    for node in nodes:
        node.gather()
    for node in nodes:
        node.thread.join(DEADLINE_S)
    return [node.came_to.nodes if node.came_to else node.error for node in nodes]


def test_those_that_are_left_go_on_and_one_that_is_started_again_is_taken_in(run, nodes):
    first, second, third = nodes(0, 1, 2)
    assert gather(first, second, third) == [(0, 1, 2)] * 3
    assert [first.course.leads, second.course.leads] == [True, False]
    first.course.__exit__()  # its supervisor is killed
    for node in (second, third):
        node.lose()
    assert gather(second, third) == [(1, 2)] * 2
    assert second.course.plan.node_rank == 0
    assert second.course.plan.node == 1
    assert run.read_status()["nodes"] == 2
    (again,) = nodes(0)
    again.gather()
    with second.course.usher() as usher:
        deadline = time.monotonic() + DEADLINE_S
        while not usher.calls:
            assert time.monotonic() < deadline
            run.last_checkpoint.unlink(missing_ok=True)
            run.last_checkpoint.symlink_to(f"step-{time.monotonic_ns()}")
            time.sleep(0.5)
    assert second.course.goes_on()
    assert third.course.goes_on()
    assert gather(second, third) == [(1, 2, 0)] * 2
    again.thread.join(DEADLINE_S)
    assert again.came_to.nodes == (1, 2, 0)
    assert [event["node"] for event in history.events(run, "node_lost")] == [0]
    assert [event["node"] for event in history.events(run, "node_joined")] == [0]


def test_of_two_parts_that_do_not_reach_each_other_just_one_goes_on(run, nodes, monkeypatch):
    first, second = nodes(0, 1, of="1:2")
    assert gather(first, second) == [(0, 1)] * 2
    monkeypatch.setattr(courses, "reached", lambda _words: set())  # the network between them is cut
    for node in (first, second):
        node.lose()
    first.gather()
    second.gather()
    first.thread.join(DEADLINE_S)
    assert first.came_to.nodes == (0,)  # of two halves the one with the leader
    assert second.course.is_over
    monkeypatch.setattr(deciding, "ALONE_S", 0.0)
    time.sleep(deciding.NOTICE_S)
    assert second.came_to is None
    assert not second.course.is_member
    monkeypatch.setattr(courses, "reached", presence.reached)
    assert first.course.goes_on()  # it is to be taken in
    assert gather(first) == [(0, 1)]
    second.thread.join(DEADLINE_S)
    assert second.came_to.nodes == (0, 1)


@pytest.mark.parametrize("who", ["a member", "one that only waits"])
def test_a_stop_between_generations_ends_all_and_one_of_a_node_that_only_waits_ends_that(who, run, nodes):
    first, second, third = nodes(0, 1, 2, of="3:3")
    assert gather(first, second, third) == [(0, 1, 2)] * 3
    third.course.__exit__()
    (again,) = nodes(2, of="3:3")
    for node in (first, second):
        node.lose()
    waiting = [again] if who == "one that only waits" else [first, second, again]
    waiting[0].stop.request(reason="stopped by SIGINT", cause="interrupted")
    assert all(isinstance(result, StoppedError) for result in gather(*waiting))
    assert {node.stop.cause for node in waiting} == {"interrupted"}
    assert bool(Generations(run, "start").stop()) == (who == "a member")


def test_too_few_nodes_wait_a_while_for_others_to_come_back(run, nodes, monkeypatch):
    monkeypatch.setattr(courses, "COME_BACK_S", 3.0)
    first, second = nodes(0, 1, of="2:2")
    assert gather(first, second) == [(0, 1)] * 2
    second.course.__exit__()
    first.lose("node 1 (n1) is gone")
    (error,) = gather(first)
    assert isinstance(error, StoppedError)
    assert first.stop.cause == "lost_node"
    assert first.stop.reason.startswith("node 1 (n1) is gone; 1 of at least 2 nodes are here")


def test_losses_without_a_step_between_them_end_the_run(run, nodes):
    first, second = nodes(0, 1, of="1:2")
    for number in range(1, 4):
        assert gather(first, second) == [(0, 1)] * 2
        run.append_event("attempt_started", attempt=number, node=0)
        second.course.__exit__()
        first.lose()
        result = gather(first)[0]
        if number < 3:
            assert result == (0,)
            assert first.course.goes_on()
            (second,) = nodes(1, of="1:2")
    assert isinstance(result, TrainingError)
    assert "3 attempts in a row ended at step 0 (lost_node, lost_node, lost_node)" in str(result)
    assert run.read_status()["state"] == "failed"
    (late,) = nodes(1, of="1:2")
    assert isinstance(gather(late)[0], EndedError)


def test_a_node_that_was_lost_three_times_as_soon_as_it_had_come_is_left_out(run):
    for node in (1, 2, 1, 2, 1):
        run.append_event("node_lost", node=node, generation=1)
    (why,) = left_out(run).values()
    assert why.startswith("node 1 was lost 3 times in 10 minutes, each time before another checkpoint was written")


def test_a_node_with_which_the_run_got_on_may_be_lost_as_often_as_it_likes(run):
    for step in range(5):
        run.append_event("node_joined", node=1, generation=1)
        run.append_event("checkpoint", step=step)
        run.append_event("node_lost", node=1, generation=2)
    assert left_out(run) == {}
    run.append_event("node_joined", node=1, generation=1)
    run.append_event("node_lost", node=1, generation=2)
    assert left_out(run) == {}


def test_a_node_that_renews_its_file_and_does_not_answer_is_not_reached(run):
    generations = Generations(run, "start")
    with presence.Presence(generations, node=1, address="127.0.0.1") as there:
        assert list(presence.living_nodes(generations)) == [1]
        others = presence.Others(generations, 0)
        deadline = time.monotonic() + DEADLINE_S
        while not (words := others.look()):
            assert time.monotonic() < deadline
        assert presence.reached(words.values()) == {there.word.start}
        assert presence.reached([replace(words[1], start="another" * 4)]) == set()
        assert presence.reached([replace(words[1], port=1)]) == set()
    assert presence.living_nodes(generations) == {}
    assert presence.reached(words.values()) == set()


@pytest.fixture
def clock(monkeypatch):
    """Time that goes by only in waits; what is given for a moment is done then."""
    clock = SimpleNamespace(now=0.0, then={})

    def sleep(seconds):
        before, clock.now = clock.now, clock.now + seconds
        for moment in [moment for moment in clock.then if before < moment <= clock.now]:
            clock.then.pop(moment)()

    for module in (presence, waiting):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep, strftime=str))
    return clock


def test_all_nodes_that_live_are_found_and_not_only_the_one_that_is_seen_first(run, clock):
    generations = Generations(run, "start")
    generations.folder.mkdir(parents=True)

    def say(node, count):
        write_json_atomic(generations.presence(node), asdict(presence.Word(node=node, start="a", count=count)))

    for node in (1, 2, 3):
        say(node, 1)
    clock.then = {0.5: lambda: say(1, 2), 2.5: lambda: say(2, 2)}
    assert list(presence.living_nodes(generations)) == [1, 2]


def test_who_gets_to_look_only_now_and_then_does_not_wait_for_ever(run, clock, monkeypatch):
    generations = Generations(run, "start")
    generations.folder.mkdir(parents=True)

    def say(node, count):
        write_json_atomic(generations.presence(node), asdict(presence.Word(node=node, start="a", count=count)))

    say(1, 1)  # it is dead
    say(2, 1)
    clock.then = {second: lambda count=second: say(2, count) for second in range(2, 60)}
    monkeypatch.setattr(waiting, "wait_until", partial(waiting.wait_until, every_s=5.0))
    assert list(presence.living_nodes(generations)) == [2]
    assert clock.now == 20.0


def test_who_has_not_looked_for_a_while_takes_no_node_for_lost(run, nodes):
    first, second = nodes(0, 1, of="2:2")
    assert gather(first, second) == [(0, 1)] * 2
    second.course._others._looked -= 100.0  # as on a machine that is busy
    second.course.heed_wait()
    first.course.__exit__()
    with pytest.raises(LeaderLostError, match=r"node 0 .* is gone"):
        second.course.heed_wait()


def test_what_a_node_says_is_not_lost_where_its_file_is_renewed_at_the_same_time(run, monkeypatch):
    there = presence.Presence(Generations(run, "start"), node=1, address="127.0.0.1")
    say = threading.Thread(target=there.say, kwargs={"generation": 7, "ready": True})

    def renewed(word, **changes):
        if "count" in changes:
            say.start()
            say.join(0.3)  # in vain where it has to wait
        return replace(word, **changes)

    there._file.parent.mkdir(parents=True)
    monkeypatch.setattr(presence, "replace", renewed)
    there._renew()
    say.join()
    assert (there.word.generation, there.word.count) == (7, 1)


def test_nodes_that_only_wait_carry_no_run_out_and_leave_where_node_0_begins_it_anew(run, nodes):
    plan = LaunchPlan(run_id="run", nodes=3, min_nodes=2, node_rank=0)
    generations = Generations.by_hand(run)
    (late,) = nodes(1, of="2:3")
    late.course.__exit__()
    late.course = Course(run, late.course._plan, late.stop, generations, range(2))
    late.course.__enter__()
    late.gather()
    assert not meeting.goes_on_elsewhere(run, plan)
    word = late.course._presence.word
    generations.make(Generation(number=1, members=(Member(node=1, host="n1", start=word.start),)))
    assert meeting.goes_on_elsewhere(run, plan)
    with pytest.raises(UsageError, match="node 1 takes part in this run already"):
        meeting.goes_on_elsewhere(run, replace(plan, node_rank=1))
    late.thread.join(DEADLINE_S)
    assert late.came_to.nodes == (1,)
    write_json_atomic(run.plan, json.loads(run.plan.read_text()) | {"created": 5.0})
    (result,) = gather(late)
    assert isinstance(result, EndedError)
    assert "start this node again" in str(result)


def test_a_generation_is_made_once_whoever_tries(run):
    generations = Generations(run, "start")
    generations.folder.mkdir(parents=True)
    made, start = [], threading.Barrier(8)

    def make(attempt):
        start.wait()
        if generations.make(Generation(number=1, attempt=attempt)):
            made.append(attempt)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [generations.newest().attempt] == made
