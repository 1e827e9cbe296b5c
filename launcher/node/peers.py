"""What the supervisors of a run's nodes know of each other: who has come, who is gone, who was told to stop.

Each counts up a number in the store in which torch's agents meet, once a second, and reads those of the others. The
store itself is in node 0's process: where it does not answer, that node is gone.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from launcher.runs.run_dir import node_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.plan.launch_plan import LaunchPlan

BEAT_S = 1.0
LOST_S = 20.0
"""A node that was not heard of for so long is gone."""
LOST_IDLE_S = 10.0
"""The same where no worker of this node lives, so that nothing is lost by leaving."""
SILENT_S = 3.0
"""The same where this node was told to stop and leaves: it may be for that node's sake (SLURM)."""
ANSWER_S = 5.0
"""How long the store gets for an answer."""
_STOP = "launcher/stop"
_LEFT = "launcher/left/{}"


class Peers:
    """While entered, keeps in touch with the other nodes; a run of one node has none.

    Args:
        plan: as this node carries it out.
        hosts: names of the nodes' machines where all of them are known to live, so that one which never comes is lost.
    """

    def __init__(self, plan: LaunchPlan, hosts: Mapping[int, str] | None = None) -> None:
        self._endpoint = plan.rdzv_endpoint
        self._own = plan.node_rank
        self._others = [node for node in range(plan.nodes) if node != plan.node_rank]
        self._beats = dict.fromkeys(self._others, 0)
        self._numbers = plan.members or tuple(range(plan.nodes))
        self._heard: dict[int, float] = dict.fromkeys(self._others, time.monotonic()) if hosts else {}
        self._hosts: dict[int, str] = dict(hosts or {})
        self._left: dict[int, float] = {}
        self._answered = self._looked = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_in_touch, name="peers", daemon=True)
        self._told = ""
        self.stopped = ""
        """Which node was told to stop, and by what; empty: none was."""

    def __enter__(self) -> Self:
        if self._others:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._others:
            self._thread.join(BEAT_S)  # it says farewell

    @property
    def is_first(self) -> bool:
        """Whether this is the node that holds rank 0."""
        return self._own == 0

    def tell(self, reason: str) -> None:
        """Have the other nodes stop too."""
        self._told = f"{self.name(self._own)}: {reason}"

    def name(self, node: int) -> str:
        """A node as a person knows it: ``node 1 (gpu-7)``."""
        host, number = node_name() if node == self._own else self._hosts.get(node), self._numbers[node]
        return f"node {number} ({host})" if host else f"node {number}"

    def awaited(self) -> str:
        """Those that have not come yet, in words; empty: all have."""
        missing = [node for node in self._others if node not in self._heard]
        if not missing:
            return ""
        if missing[0] == 0:
            return f"node {self._numbers[0]} at {self._endpoint}"
        return ", ".join(f"node {self._numbers[node]}" for node in missing) + f" to come to {self._endpoint}"

    def heard(self) -> list[int]:
        """The other nodes that have come and have not said that they leave."""
        return [node for node in self._heard if node not in self._left]

    def lost(self, *, idle: bool) -> str:
        """The first node that came and is gone, in words; empty: there is none.

        Args:
            idle: no worker of this node lives; then one that has left by itself is of no more use either.
        """
        patience, now = LOST_IDLE_S if idle else LOST_S, time.monotonic()
        left = [node for node, since in self._left.items() if idle and now - since > patience]
        return self.silent(patience) or (f"{self.name(left[0])} has left" if left else "")

    def silent(self, seconds: float = SILENT_S) -> str:
        """The first node that was not heard of for so long and has not said that it leaves, in words."""
        now = time.monotonic()
        if self._own and 0 in self._heard and 0 not in self._left and now - self._answered > seconds:
            return self._gone(0, now - self._answered)
        for node, heard in self._heard.items():
            if node not in self._left and self._looked - heard > seconds:
                return self._gone(node, now - heard)
        return ""

    def unheard(self) -> str:
        """The first node that has never said that it lives, in words; it is gone where its workers were met."""
        return next((self._gone(node, 0) for node in self._others if node not in self._heard), "")

    def why_apart(self) -> str:
        """Why torch's agent has given up, in words."""
        awaited = self.awaited()
        return f"waited in vain for {awaited}" if awaited else self.lost(idle=True) or self._gone(0, 0)

    def _gone(self, node: int, seconds: float) -> str:
        ago = f"nothing was heard of its launcher for {seconds:.0f} s" if seconds else "its launcher does not answer"
        return f"{self.name(node)} is gone: {ago}"

    def _keep_in_touch(self) -> None:
        from torch.distributed import DistError, TCPStore

        host, _, port = self._endpoint.rpartition(":")
        host = host.strip("[]")
        store = None
        while not self._done.wait(BEAT_S):
            try:
                if store is None:
                    socket.create_connection((host, int(port)), timeout=ANSWER_S).close()  # torch would warn each time
                    answer = timedelta(seconds=ANSWER_S)
                    store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=answer)
                    store.set(f"launcher/host/{self._own}", node_name())
                self._exchange(store)
            except (OSError, RuntimeError, DistError):  # node 0 is not there yet, or gone
                store = None
        with contextlib.suppress(RuntimeError, DistError):
            if store is not None:
                store.set(_LEFT.format(self._own), "")

    def _exchange(self, store: Any) -> None:
        store.add(f"launcher/beat/{self._own}", 1)
        self._answered = time.monotonic()  # before anybody counts as heard of: node 0's silence is measured from here
        for node in self._others:
            beats = store.add(f"launcher/beat/{node}", 0)
            if beats != self._beats[node]:
                self._beats[node] = beats
                if node not in self._hosts:
                    self._hosts[node] = store.get(f"launcher/host/{node}").decode()
                self._heard[node] = time.monotonic()
            if node not in self._left and store.check([_LEFT.format(node)]):
                self._left[node] = time.monotonic()
        if self._told:
            store.set(_STOP, json.dumps([self._own, self._told]))
        if store.check([_STOP]):
            node, told = json.loads(store.get(_STOP))
            if node != self._own:
                self.stopped = told
        # The silence of the others is measured from one look at all of them to the next: this node may have stood still
        # in between, and finds what they said meanwhile.
        self._answered = self._looked = time.monotonic()
