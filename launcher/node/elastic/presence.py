"""What each node of a run that shrinks and grows says of itself, and whom of the others it reaches.

Two ways, since each alone deceives: a file in the run directory, renewed every second (a node that stands still or is
dead renews none), and a connection over the network (a node whose cable is cut takes none).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from launcher.runs.run_dir import node_name
from launcher.system import waiting
from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from launcher.runs.generations import Generations

RENEW_S = 1.0
STALE_S = 8.0
"""A node whose file was not renewed for so long is dead or stands still."""
REACH_S = 2.0
"""How long a node gets to answer a connection."""
PROBES = 8
"""Nodes that are called at the same time."""
WATCH_S = 4 * RENEW_S
"""How long to look whether a node renews its file, before which nobody knows whether it lives."""
UNSURE_S = 4 * WATCH_S
"""For so long at most, however rarely one gets to look; then it lives if it renewed its file since the last look."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """What a node says of itself."""

    node: int
    """Which of the run's nodes it is."""
    host: str = ""
    """Its name."""
    start: str = ""
    """An id of its supervisor, which it also answers a connection with."""
    address: str = ""
    """Where the others reach it."""
    port: int = 0
    """Where it answers."""
    count: int = 0
    """How often it has renewed its file."""
    generation: int = 0
    """The newest generation that it knows of."""
    ready: bool = False
    """Whether no worker of it lives and it waits for the generation after that one."""
    hears: tuple[str, ...] = ()
    """Ids of the supervisors that it reaches."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What its file says."""
        return cls(**{**values, "hears": tuple(values["hears"])})


class Presence:
    """While entered, says that this node is there and answers connections.

    Args:
        generations: of this start of the run.
        node: which of the run's nodes this is.
        address: where the others reach it.
    """

    def __init__(self, generations: Generations, *, node: int, address: str) -> None:
        self._file = generations.presence(node)
        self._word = Word(node=node, host=node_name(), start=uuid.uuid4().hex, address=address)
        self._changed = threading.Event()
        self._done = False
        self._saying = threading.Lock()
        self._changing = threading.Lock()

    @property
    def word(self) -> Word:
        """What it says now."""
        return self._word

    def __enter__(self) -> Self:
        family = socket.AF_INET6 if ":" in self._word.address else socket.AF_INET
        self._listener = socket.create_server((self._word.address, 0), family=family, backlog=64)
        self._word = replace(self._word, port=self._listener.getsockname()[1])
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._renew()
        threading.Thread(target=self._keep, name="presence", daemon=True).start()
        threading.Thread(target=self._answer, name="presence-answers", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done = True
        self._changed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._saying, contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def say(self, *, generation: int, ready: bool, hears: Iterable[str] = ()) -> None:
        """Say something else from now on."""
        hears = tuple(sorted(hears))
        with self._changing:  # what is renewed at the same time must not bring back what was said before
            before = self._word
            if (before.generation, before.ready, before.hears) != (generation, ready, hears):
                self._word = replace(before, generation=generation, ready=ready, hears=hears)
                self._changed.set()

    def _keep(self) -> None:
        while not self._done:
            self._changed.clear()
            with contextlib.suppress(OSError):  # a full disk, or a file system that fails for a moment
                self._renew()
            self._changed.wait(RENEW_S)

    def _renew(self) -> None:
        with self._saying:
            if not self._done:
                with self._changing:
                    self._word = replace(self._word, count=self._word.count + 1)
                write_json_atomic(self._file, asdict(self._word))

    def _answer(self) -> None:
        while not self._done:
            with contextlib.suppress(OSError):
                caller, _ = self._listener.accept()
                with caller:
                    caller.settimeout(REACH_S)
                    caller.sendall(self._word.start.encode())


class Others:
    """The other nodes, as this one sees them.

    Args:
        generations: of this start of the run.
        own: which of the run's nodes this is; None: none of them.
    """

    def __init__(self, generations: Generations, own: int | None) -> None:
        self._generations = generations
        self._own = own
        self._renewed: dict[int, tuple[str, int, float]] = {}
        self._found: dict[int, float] = {}
        self._unsure_since: dict[int, float] = {}
        self._seen: dict[int, tuple[str, int]] = {}
        self._looked = 0.0
        self.unsure: dict[int, Word] = {}
        """What those say of which the last look could not tell whether they live: their files are watched too short."""

    def look(self) -> dict[int, Word]:
        """What those say that live: whose file was seen to be renewed a moment ago."""
        living, self.unsure = {}, {}
        if time.monotonic() - self._looked > STALE_S / 2:
            self._renewed.clear()  # what has changed since then may have done so long ago
        self._looked = time.monotonic()
        for node in self._generations.nodes_seen():
            if node == self._own:
                continue
            try:
                text = self._generations.presence(node).read_text(encoding="utf-8")
                word = Word.from_dict(json.loads(text))
            except (OSError, ValueError):  # it has just left
                continue
            lives = self._lives(node, word)
            if lives is None:
                self.unsure[node] = word
            elif lives:
                living[node] = word
        return living

    def _lives(self, node: int, word: Word) -> bool | None:
        """Whether a node lives whose file says this now; None: that is not known yet."""
        now, before = time.monotonic(), self._renewed.get(node)
        seen, self._seen[node] = self._seen.get(node), (word.start, word.count)
        if not seen or seen[0] != word.start:
            self._unsure_since.pop(node, None)
        if before is None or before[0] != word.start:
            self._found[node] = now
        if before is None or before[:2] != (word.start, word.count):
            # The first sight of a file says nothing of when it was written.
            self._renewed[node] = (word.start, word.count, now if before else -STALE_S)
        if now - self._renewed[node][2] < STALE_S:
            self._unsure_since.pop(node, None)
            return True
        if now - self._found[node] >= WATCH_S:
            return False
        is_soon = now - self._unsure_since.setdefault(node, now) < UNSURE_S
        return None if is_soon else seen != self._seen[node]


def reached(words: Iterable[Word]) -> set[str]:
    """Ids of those supervisors that answer over the network."""
    found = list(words)
    if not found:
        return set()
    with ThreadPoolExecutor(max_workers=min(PROBES, len(found))) as pool:
        return {word.start for word, answers in zip(found, pool.map(_answers, found), strict=True) if answers}


def _answers(word: Word) -> bool:
    try:
        with socket.create_connection((word.address, word.port), timeout=REACH_S) as connection:
            connection.settimeout(REACH_S)
            return connection.recv(len(word.start)).decode() == word.start
    except (OSError, ValueError):
        return False


def living_nodes(generations: Generations) -> dict[int, Word]:
    """What those say that take part in this start of the run now, or wait to; takes some seconds where any ever did."""
    others = Others(generations, None)
    living: dict[int, Word] = {}

    def is_known() -> bool:
        """Of all of them: who is seen first must not hide one that is renewed a moment later."""
        nonlocal living
        living = others.look()
        return not others.unsure

    waiting.wait_until(is_known, timeout_s=None, heed=lambda: None, what="signs of life of other nodes")
    return living
