"""The way of one node through the generations of a run: it waits, trains, gathers with the others, trains on."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from launcher.errors import TrainingError
from launcher.node.elastic import deciding, records
from launcher.node.elastic.presence import Others, Presence, Word, reached
from launcher.node.elastic.usher import Usher, left_out
from launcher.runs import history, whereabouts
from launcher.runs.generations import NEXT_VARIABLE, Generation, Generations, Member
from launcher.system import network, processes, waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from launcher.node.signals import StopSignals
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.runs.run_dir import RunDir

COME_BACK_S = 120.0
"""How long too few nodes wait for others to come, or to come back."""
POLL_S = 0.3
HEED_S = 1.0
"""How often a node whose workers train looks whether another one was told to stop."""


class StoppedError(Exception):
    """A stop was asked for while no worker of this node lived, as ``StopSignals`` says; or too few nodes are left."""


class EndedError(Exception):
    """The run has ended without this node, which waited to be taken in."""

    def __init__(self, *, state: str, message: str) -> None:
        super().__init__(message)
        self.state = state


class LeaderLostError(Exception):
    """The leader of a generation is gone before the workers were started."""


class Course:
    """While entered, this node takes part in a run that shrinks and grows, or waits to.

    Args:
        run: the run directory.
        plan: the run's, as this node was given it.
        stop: whether a stop was asked for.
        generations: of this start of the run.
        expected: the nodes that the first generation waits for.
        spared: processes that outlive a generation's workers.
    """

    def __init__(
        self,
        run: RunDir,
        plan: LaunchPlan,
        stop: StopSignals,
        generations: Generations,
        expected: Sequence[int],
        spared: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._run = run
        self._plan = plan
        self._stop = stop
        self._generations = generations
        self._spared = spared
        self._presence = Presence(generations, node=plan.node_rank, address=plan.address)
        self._others = Others(generations, plan.node_rank)
        self._last = Generation(number=0, members=tuple(Member(node=node, host="", start="") for node in expected))
        self._noticed = time.monotonic()
        self._reason = ""
        self._heeded = 0.0

    def __enter__(self) -> Self:
        self._presence.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._presence.__exit__()

    @property
    def leads(self) -> bool:
        """Whether this node is the first of the newest generation that it knows of."""
        return self._index == 0

    @property
    def is_member(self) -> bool:
        """Whether it is any of it; before the first one: whether it is expected."""
        return self._index is not None or (not self._last.number and self._plan.node_rank in self._last.nodes)

    @property
    def _index(self) -> int | None:
        return self._last.index(self._presence.word.start)

    @property
    def plan(self) -> LaunchPlan:
        """The plan as this node carries it out in that generation."""
        last, plan = self._last, self._plan
        if self._index is None:
            return plan
        return replace(
            plan,
            nodes=len(last.members),
            node_rank=self._index,
            members=last.nodes,
            rdzv_endpoint=last.endpoint,
            max_restarts=max(0, plan.max_restarts - records.num_restarts(self._run, last.first_attempt)),
        )

    @property
    def generation(self) -> Generation:
        """The newest one that this node knows of."""
        return self._last

    @property
    def hosts(self) -> dict[int, str]:
        """Names of its members' machines."""
        return {index: member.host for index, member in enumerate(self._last.members)}

    @property
    def environment(self) -> dict[str, str]:
        """Variables for the workers."""
        return {NEXT_VARIABLE: str(self._generations.file(self._last.number + 1))}

    @property
    def is_over(self) -> bool:
        """Whether the other nodes have gone on to a later one."""
        with contextlib.suppress(OSError):
            return waiting.is_listed(self._generations.file(self._last.number + 1))
        return False

    def usher(self) -> Usher:
        """What looks for nodes to be taken in, where this node is to."""
        most = self._plan.nodes if self.leads else 0
        others = Others(self._generations, self._plan.node_rank)
        return Usher(self._run, self._last, others, lambda: self._presence.word, most=most)

    def heed(self) -> None:
        """Take notice, while workers of this node live, of stops and of the others having gone on; seldom enough."""
        if time.monotonic() - self._heeded > HEED_S:
            self._heeded = time.monotonic()
            with contextlib.suppress(OSError):  # a file system that fails for a moment must not end what trains
                self._heed_stop()
            if not self._stop.requested and self.is_over:
                self._stop.request(reason="the other nodes went on without this one", cause="lost_node")

    def _heed_stop(self) -> None:
        """Tell the other nodes of a stop, or this one of theirs."""
        stop = self._stop
        if stop.requested and stop.cause != "lost_node" and self.is_member:
            self._generations.say_stop(reason=stop.reason, cause=stop.cause)
        elif not stop.requested and (told := self._generations.stop()):
            stop.request(reason=told["reason"], cause=told["cause"])

    def heed_wait(self) -> None:
        """Take notice of a stop, and leave a wait for the leader where it is gone.

        Raises:
            LeaderLostError: it is, or the others have gone on.
        """
        self._heed_stop()
        living = self._others.look() | self._others.unsure
        leader = self._last.members[0]
        if self.is_over or not (self.leads or any(word.start == leader.start for word in living.values())):
            self._reason = f"node {leader.node} ({leader.host}) is gone: nothing was heard of its launcher"
            raise LeaderLostError(self._reason)

    def goes_on(self) -> bool:
        """Whether to train on after the workers have ended, with the nodes that are left or have come.

        No process of this node is left then but those that are spared.
        """
        processes.kill_descendants(self._spared)
        self._heed_stop()
        self._noticed = time.monotonic()
        if self._stop.requested and self._stop.cause != "lost_node":
            return False
        self._reason = self._stop.reason
        self._stop.forget_loss()
        return not self._stop.requested

    def end(self, *, state: str, message: str = "") -> None:
        """Tell nodes that wait to be taken in that the run has ended; the leader's to say."""
        if self.leads:
            with contextlib.suppress(OSError):  # a full disk
                self._generations.say_end(state=state, message=message)

    def next(self) -> Generation:
        """Wait until this node is in a generation.

        Raises:
            StoppedError: a stop was asked for, or too few nodes are left.
            EndedError: the run has ended.
            TrainingError: losses follow each other without a new step in between.
        """
        since, notice = _Since(), waiting.Notice()
        while True:
            is_new = self._find_newer()
            self._heed_stop()
            if self._stop.requested:
                raise StoppedError
            self._heed_end()
            if is_new:
                if self._index is not None:
                    self._begin()
                    return self._last
                since = _Since()
            view = self._look(since)
            problem = ""
            if found := deciding.decide(view):
                problem = self._make(found)
                if not problem:
                    continue
            if time.monotonic() - since.too_few > COME_BACK_S:
                self._give_up(view)
            notice.say(problem or self._awaited(view))
            time.sleep(POLL_S)

    def _begin(self) -> None:
        """Take part in the newest generation."""
        self._presence.say(generation=self._last.number, ready=False)
        if self._last.number > 1:
            why = f"{self._reason}; " if self._reason else ""
            step = records.newest_step(self._run)
            print(f"{why}going on from step {step} as {records.names(self._last)}", flush=True)

    def _find_newer(self) -> bool:
        """Take notice of a later generation, if there is one."""
        newest, before = self._generations.newest(), self._last
        if newest is None or newest.number <= before.number:
            return False
        was_in, self._last = self._index is not None, newest
        if self._index is None and was_in:
            print(
                f"the others went on without this node, as {records.names(newest)}; it waits to be taken in again",
                flush=True,
            )
        return True

    def _look(self, since: _Since) -> deciding.View:
        """See who is there, and say whom this node hears."""
        last, others = self._last, self._others.look()
        self._presence.say(generation=last.number, ready=True, hears=reached(others.values()))
        now, plan = time.monotonic(), self._plan
        view = deciding.View(
            own=self._presence.word,
            others=others,
            last=last,
            fewest=plan.fewest_nodes,
            most=plan.nodes,
            waited_s=now - since.ready,
            unchanged_s=now - since.changed,
            left_out=left_out(self._run) if last.number else (),
            unsure=self._others.unsure,
        )
        num = len(deciding.group(view))
        if num != since.num:
            since.num, since.changed = num, now
        if num >= plan.fewest_nodes or any(not word.ready for word in others.values()):
            since.too_few = now
        return replace(view, unchanged_s=now - since.changed)

    def _heed_end(self) -> None:
        told, state = self._generations.end(), self._run.read_status()["state"]
        if told:
            raise EndedError(**told)
        if state in whereabouts.OVER:
            raise EndedError(state=state, message="")
        if not self._generations.is_latest(self._run):
            raise EndedError(state="preempted", message="node 0 was started anew; start this node again too")

    def _make(self, found: Sequence[Word]) -> str:
        """Decide the next generation, unless another node has done so; return what keeps this node from it, if any."""
        try:
            self._decide(found)
        except OSError as error:
            return f"the run directory: {self._run} cannot be written to: {error.strerror}"
        return ""

    def _decide(self, found: Sequence[Word]) -> None:
        last, run = self._last, self._run
        starts = {word.start for word in found}
        lost = [f"node {one.node} ({one.host})" for one in last.members if one.start not in starts]
        reason = self._reason or f"{', '.join(lost)} left without a word"
        if last.number and lost:
            refused = records.close_attempt(run, last, node=self._plan.node_rank, reason=reason)
            if refused:
                self._generations.say_end(state="failed", message=refused)
                raise TrainingError(f"{refused}\nmore: launch why {run}")
        attempt = history.next_attempt(run)
        made = Generation(
            number=last.number + 1,
            members=tuple(Member(node=word.node, host=word.host, start=word.start) for word in found),
            endpoint=self._endpoint(last.number + 1),
            attempt=attempt,
            first_attempt=last.first_attempt or attempt,
        )
        if self._generations.make(made):
            seconds = time.monotonic() - self._noticed
            records.regrouped(run, last, made, seconds=seconds, reason=reason)

    def _give_up(self, view: deciding.View) -> None:
        """Too few nodes are left, and none has come."""
        found, fewest = len(deciding.group(view)), self._plan.fewest_nodes
        why = f"{self._reason}; " if self._reason else ""
        self._stop.request(
            reason=f"{why}{found} of at least {fewest} nodes are here, and no other has come in {COME_BACK_S:.0f} s",
            cause="lost_node",
        )
        raise StoppedError

    def _awaited(self, view: deciding.View) -> str:
        """What this node waits for, in words."""
        found, fewest = deciding.group(view), self._plan.fewest_nodes
        if any(not word.ready for word in view.others.values()) and not self.is_member:
            return f"the run, which goes on as {records.names(self._last)}, to take this node in"
        if len(found) < fewest:
            return f"{fewest - len(found)} more nodes to come: {len(found)} of at least {fewest} are here"
        lacking = ", ".join(map(str, deciding.missing(view)))
        return f"node {lacking}" if lacking else ""

    def _endpoint(self, number: int) -> str:
        """Where the agents of a generation meet: at this node; the first one by the port that somebody named."""
        _, port = network.split(self._plan.rdzv_endpoint)
        if number > 1 or not port:
            port = network.free_port(os.getpid() + number)
        return network.join(self._plan.address, port)


class _Since:
    """Moments of a wait."""

    def __init__(self) -> None:
        self.ready = self.changed = self.too_few = time.monotonic()
        self.num = 0
