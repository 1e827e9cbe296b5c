"""The leader's look-out for nodes that wait to be taken in: after the next checkpoint they are."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

from launcher.node.elastic import deciding
from launcher.node.elastic.presence import Others, Word, reached
from launcher.system.files import read_jsonl

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.runs.generations import Generation
    from launcher.runs.run_dir import RunDir

LOOK_S = 2.0


def left_out(run: RunDir) -> dict[int, str]:
    """Nodes that were lost again and again as soon as they had come, each with why in words.

    One that has helped the run on to another checkpoint in between may be lost as often as it likes.
    """
    since, saved = time.time() - deciding.FLAP_S, 0.0
    came, counts = dict[int, float](), dict[int, int]()
    for event in read_jsonl(run.events):
        if event["kind"] == "checkpoint":
            saved = event["time"]
        elif event["kind"] == "node_joined":
            came[event["node"]] = event["time"]
        elif event["kind"] == "node_lost":
            node, in_vain = event["node"], saved <= came.get(event["node"], 0.0)
            counts[node] = counts.get(node, 0) + 1 if in_vain and event["time"] > since else 0
    return {
        node: f"node {node} was lost {num} times in {deciding.FLAP_S / 60:.0f} minutes, each time before another "
        "checkpoint was written, and is not taken in for a while"
        for node, num in counts.items()
        if num >= deciding.FLAPS
    }


class Usher:
    """While entered, looks for nodes that wait.

    Args:
        run: the run directory.
        generation: the present one, which this node leads.
        others: the other nodes; used by this thread alone.
        own: what this node says of itself.
        most: nodes of a generation, at most.
    """

    def __init__(
        self, run: RunDir, generation: Generation, others: Others, own: Callable[[], Word], *, most: int
    ) -> None:
        self._run = run
        self._generation = generation
        self._others = others
        self._own = own
        self._room = most - len(generation.members)
        self._done = threading.Event()
        self._told: set[str] = set()
        self.calls = False
        """Whether some wait, and a checkpoint was written since they came."""

    def __enter__(self) -> Self:
        if self._room > 0:
            threading.Thread(target=self._watch, name="usher", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        checkpoint = None
        while not self._done.wait(LOOK_S):
            try:
                waiting = self._waiting()
            except OSError:  # a file system that fails for a moment
                continue
            for word in waiting:
                self._say(word.start, f"node {word.node} ({word.host}) has come; it is taken in at the next checkpoint")
            newest = self._run.last_checkpoint.resolve().name
            if not waiting or checkpoint is None:
                checkpoint = newest if waiting else None
            elif newest != checkpoint:
                self.calls = True
                return

    def _waiting(self) -> list[Word]:
        """Nodes that wait, hear this one and are heard."""
        own, number = self._own().start, self._generation.number
        ready = [w for w in self._others.look().values() if w.ready and w.generation == number and own in w.hears]
        found = [word for word in ready if self._generation.index(word.start) is None]
        if not found:
            return []
        why = left_out(self._run)
        for word in found:
            if word.node in why:
                self._say(word.start, why[word.node])
        heard = reached(word for word in found if word.node not in why)
        return [word for word in found if word.start in heard]

    def _say(self, start: str, text: str) -> None:
        if start not in self._told:
            self._told.add(start)
            print(text, flush=True)
