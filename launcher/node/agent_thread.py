"""torch's elastic agent in a thread of its own, and what the main thread does meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from launcher.node.peers import LOST_IDLE_S, SILENT_S
from launcher.runs import history, whereabouts
from launcher.system import waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.node.part import Part
    from launcher.node.peers import Peers
    from launcher.node.signals import StopSignals
    from launcher.runs.heartbeats import Heartbeats
    from launcher.runs.run_dir import RunDir

IDLE_S = 2.0
"""After a stop, torch's agent gets as long without a living worker to come to an end by itself."""
SAVE_S = 60.0
"""How long the workers get to save and leave where another node is gone: some may wait for those of it for ever."""
LEAVE_S = 5.0
"""The same where this node then goes on without that one: so long without a step, and without a checkpoint being
written."""
ASK_S = LOST_IDLE_S + 2.0
"""How long a node is looked out for whose workers have vanished."""
FAREWELL_S = SILENT_S + 2.0
"""How long a node that was told to stop waits for the others to say that they leave; one that says nothing is lost."""
STACK_BYTES = 64 << 20
"""Of the thread that forks the workers, on whose stack they run."""


class LeftError(Exception):
    """No worker of this node lives, and torch's agent waits for other nodes: of no use after a stop or a loss."""


class AgentThread:
    """torch's elastic agent, in a thread.

    It waits in C code for minutes, where no signal is heeded: for nodes to come, and for nodes to be done. The main
    thread stays free to take signals, to look after the other nodes, and to leave.

    Args:
        launch: runs the workers to their end.
    """

    def __init__(self, launch: Callable[[], dict[int, str]]) -> None:
        self._launch = launch
        self._outcomes: dict[int, str] = {}
        self._error: BaseException | None = None
        before = threading.stack_size(STACK_BYTES)
        self._thread = threading.Thread(target=self._work, name="agent", daemon=True)
        self._thread.start()
        threading.stack_size(before)

    def _work(self) -> None:
        try:
            self._outcomes = self._launch()
        except BaseException as error:  # raised again by attend
            self._error = error

    def attend(self, run: RunDir, stop: StopSignals, peers: Peers, beats: Heartbeats, part: Part) -> dict[int, str]:
        """Wait for the workers' outcomes; stop where another node is gone or was told to.

        Args:
            run: the run directory.
            stop: whether to stop.
            peers: the other nodes.
            beats: of this node's workers.
            part: this node's in the run.

        Raises:
            LeftError: this node left a wait for others, as ``stop`` says.
        """
        notice = waiting.Notice()
        busy = stopping_since = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(waiting.POLL_S)
            now, living = time.monotonic(), beats.living()
            if living:
                busy = now
            idle = now - busy > IDLE_S
            part.heed(living)
            if stop.requested:
                if not (part.outlives_loss and stop.cause == "lost_node"):
                    peers.tell(stop.reason)
                _end_hopeless(living, beats, stop, part, now - stopping_since)
                if idle and self._thread.is_alive():
                    blame_lost(stop, peers)
                    return _outcomes_of_trained(run, peers)
                continue
            stopping_since = now
            notice.say(peers.awaited())
            lost = peers.lost(idle=idle)
            if lost and idle and run.read_status()["state"] in whereabouts.TRAINED:
                return _outcomes_of_trained(run, peers)
            if lost:
                print(f"{lost}; {part.when_lost}", file=sys.stderr, flush=True)
                stop.request(reason=lost, cause="lost_node")
            elif peers.stopped:
                stop.request(reason=peers.stopped, cause=history.cause_of_signal(""))
        if self._error:
            raise self._error
        return self._outcomes


def _end_hopeless(living: list[int], beats: Heartbeats, stop: StopSignals, part: Part, seconds: float) -> None:
    """Where a node is lost, kill workers that have had so long to save and leave and wait for those of it for ever."""
    if stop.cause != "lost_node":
        return
    # Where only its launcher was lost they take steps still, and agree on one to stop at.
    idle_s = min([seconds, *(beat.age_s for beat in beats.read())])
    goes_on = part.outlives_loss and (part.is_over or (idle_s > LEAVE_S and not part.is_saving))
    if goes_on or seconds > SAVE_S:
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _outcomes_of_trained(run: RunDir, peers: Peers) -> dict[int, str]:
    """What the workers have left without torch's agent: where all is trained, rank 0's outcome is the run's state."""
    state = run.read_status()["state"]
    if state not in whereabouts.TRAINED:
        raise LeftError
    return {0: state} if peers.is_first else {}


def ask_for_lost(stop: StopSignals, peers: Peers) -> None:
    """A worker vanished: with its node, or alone? The node would be missed a moment later, or never be heard of.

    The latter where it died within the first second: all nodes' workers had met, so it had come.
    """
    waiting.wait_until(lambda: peers.lost(idle=True) or stop.requested, timeout_s=ASK_S, heed=lambda: None)
    if lost := peers.lost(idle=True) or ("" if stop.requested else peers.unheard()):
        stop.request(reason=lost, cause="lost_node")


def blame_lost(stop: StopSignals, peers: Peers) -> None:
    """Say that a lost node is why a SIGTERM came, where it is: SLURM stops the others when a supervisor dies."""
    if stop.cause == "preempted":
        waiting.wait_until(lambda: peers.silent() or not peers.heard(), timeout_s=FAREWELL_S, heed=lambda: None)
        stop.blame(peers.silent())
