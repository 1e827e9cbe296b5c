"""What the supervisors of a run's nodes know of each other, over a real store."""

from __future__ import annotations

import multiprocessing
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from launcher.node import agent_thread, peers
from launcher.node.agent_thread import blame_lost
from launcher.node.peers import Peers
from launcher.node.signals import StopSignals
from launcher.plan.launch_plan import LaunchPlan


@pytest.fixture
def store():
    """The store in which torch's agents meet."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))


def node(rank, store):
    return on_port(rank, store.port)


def on_port(rank, port):
    return Peers(LaunchPlan(run_id="a", name="a", nodes=2, node_rank=rank, rdzv_endpoint=f"127.0.0.1:{port}"))


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Watched:
    """A store; before and after each question the main thread asks who is gone."""

    def __init__(self, inner, who, found):
        self._inner, self._who, self._found = inner, who, found

    def __getattr__(self, name):
        def asked(*arguments):
            self._found.append(self._who.lost(idle=True))
            answer = getattr(self._inner, name)(*arguments)
            self._found.append(self._who.lost(idle=True))
            return answer

        return asked


def test_one_that_has_just_been_heard_of_for_the_first_time_is_not_gone(store, monkeypatch):
    """The main thread asks at any moment, also within the first exchange."""
    first, second, found = node(0, store), node(1, store), []
    exchange = Peers._exchange
    monkeypatch.setattr(Peers, "_exchange", lambda self, inner: exchange(self, Watched(inner, self, found)))
    with first, second:
        until(lambda: first._heard and second._heard)
    assert set(found) == {""}


def test_nobody_is_gone_because_this_node_has_not_looked_for_long(store, monkeypatch):
    """On a machine that is busy, or that was stopped for a while: what the others said meanwhile is there."""
    now, found = [1000.0], []
    monkeypatch.setattr(peers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    first, second = node(0, store), node(1, store)
    for rank in (0, 1):
        store.set(f"launcher/host/{rank}", f"n{rank}")
    for _ in range(2):
        now[0] += 10 * peers.LOST_S
        second._exchange(store)
        first._exchange(Watched(store, first, found))
    assert first.heard() == [1]
    assert set(found) == {""}
    now[0] += 10 * peers.LOST_S
    first._exchange(store)
    assert first.lost(idle=True).startswith("node 1 (n1) is gone")


def test_one_that_falls_silent_is_gone_and_one_that_says_farewell_has_left(store, monkeypatch):
    monkeypatch.setattr(peers, "LOST_S", 2.0)
    monkeypatch.setattr(peers, "LOST_IDLE_S", 2.0)
    first, second = node(0, store), node(1, store)
    with first:
        with second:
            until(lambda: first._heard)
        until(lambda: first.lost(idle=True).endswith("has left"))
        assert first.lost(idle=False) == ""


def _beat(port, leave):
    with on_port(1, port):
        leave.wait()


@pytest.mark.parametrize("dies", [True, False])
def test_a_sigterm_because_a_node_died_is_no_preemption(dies, store, make_run):
    """SLURM ends the others a moment after a supervisor was killed, long before that one is missed."""
    context = multiprocessing.get_context("fork")
    leave = context.Event()
    other = context.Process(target=_beat, args=(store.port, leave))
    other.start()
    stop = StopSignals(make_run("run"), node_rank=0)
    with node(0, store) as first:
        until(first.heard)
        other.kill() if dies else leave.set()
        stop.request(reason="stopped by SIGTERM", cause="preempted")
        blame_lost(stop, first)
    other.join()
    assert stop.cause == ("lost_node" if dies else "preempted")


def test_one_that_is_known_to_live_and_never_comes_is_lost_by_its_own_number(store, monkeypatch):
    monkeypatch.setattr(peers, "LOST_S", 2.0)
    plan = LaunchPlan(run_id="a", nodes=2, node_rank=0, members=(2, 5), rdzv_endpoint=f"127.0.0.1:{store.port}")
    with Peers(plan) as unknown, Peers(plan, {0: "n2", 1: "n5"}) as known:
        until(lambda: known.lost(idle=False))
        assert known.lost(idle=False).startswith("node 5 (n5) is gone")
        assert unknown.lost(idle=False) == ""
        assert unknown.awaited().startswith("node 5 to come")


def test_a_first_node_that_is_known_to_live_and_opens_no_store_is_lost(monkeypatch):
    monkeypatch.setattr(peers, "LOST_S", 2.0)
    plan = LaunchPlan(run_id="a", nodes=2, node_rank=1, members=(2, 5), rdzv_endpoint="127.0.0.1:1")
    with Peers(plan, {0: "n2", 1: "n5"}) as known:
        until(lambda: known.lost(idle=False))
        assert known.lost(idle=False).startswith("node 2 (n2) is gone")


@pytest.mark.parametrize("has_come", [False, True])
def test_one_that_died_before_it_was_heard_of_is_lost_where_its_workers_had_met(has_come, store, make_run, monkeypatch):
    monkeypatch.setattr(agent_thread, "ASK_S", 1.0)
    stop = StopSignals(make_run("run"), node_rank=1)
    with node(0, store), node(1, store) as second:
        if has_come:
            until(second.heard)
            agent_thread.ask_for_lost(stop, second)
        else:
            agent_thread.ask_for_lost(stop, on_port(1, 1))
    assert stop.cause == ("" if has_come else "lost_node")
    assert stop.reason.startswith("" if has_come else "node 0 is gone")
