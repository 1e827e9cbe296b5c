"""The generations of a run that shrinks and grows: which nodes train together, decided for each by one file.

A generation's file is made once and for all: of several nodes that try, one succeeds, and no file is ever changed.
Whoever finds a later generation than its own is no part of the run any more, whatever it believes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from launcher.errors import EXIT_RESUMABLE
from launcher.system.files import fsync, write_json_atomic
from launcher.system.waiting import is_listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.runs.run_dir import RunDir

NEXT_VARIABLE = "LAUNCH_NEXT_GENERATION"
"""Environment variable of a worker: the file of the generation after its own."""
NODE_VARIABLE = "LAUNCH_NODE"
"""Environment variable of a worker: which of the run's nodes it is on."""
_BEGINNING, _END = "generation-", ".json"
_BY_HAND = "start-"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A node of a generation."""

    node: int
    """Which of the run's nodes."""
    host: str
    """Its name."""
    start: str
    """An id of its supervisor: one that is started again is another."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Nodes that train together until one is lost or one more comes."""

    number: int
    """From 1."""
    members: tuple[Member, ...] = ()
    """The first one leads: it has torch's store, and takes in others."""
    endpoint: str = ""
    """Where their agents meet."""
    attempt: int = 0
    """Number of their first start of the workers."""
    first_attempt: int = 0
    """That of the first generation."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What its file says."""
        return cls(**{**values, "members": tuple(Member(**member) for member in values["members"])})

    @property
    def nodes(self) -> tuple[int, ...]:
        """Which of the run's nodes, in the order of the members."""
        return tuple(member.node for member in self.members)

    def index(self, start: str) -> int | None:
        """The place of a supervisor among the members; None: it is none."""
        return next((index for index, member in enumerate(self.members) if member.start == start), None)


class Generations:
    """Those of one start of a run, in a folder of their own.

    Args:
        run: the run directory.
        start: tells this start of the run from others.
    """

    def __init__(self, run: RunDir, start: str) -> None:
        self.folder = run.meetings / start

    @classmethod
    def by_hand(cls, run: RunDir) -> Generations:
        """Those of nodes that were started by hand."""
        return cls(run, f"{_BY_HAND}{run.read_launched().created:.6f}")

    def is_latest(self, run: RunDir) -> bool:
        """Whether nodes that were started by hand have not begun anew since; a job's starts are told apart by it."""
        return not self.folder.name.startswith(_BY_HAND) or self.folder == Generations.by_hand(run).folder

    @property
    def stop_file(self) -> Path:
        """``{reason, cause}``: all nodes are to stop; made by the first one that is told to."""
        return self.folder / "stop.json"

    @property
    def end_file(self) -> Path:
        """``{state, message}``: the run has ended; for nodes that waited to be taken in."""
        return self.folder / "end.json"

    def presence(self, node: int) -> Path:
        """What a node says of itself, every second."""
        return self.folder / f"node-{node}.json"

    def file(self, number: int) -> Path:
        """Of one generation."""
        return self.folder / f"{_BEGINNING}{number:04d}{_END}"

    def newest(self) -> Generation | None:
        """The one that counts; None: there is none yet."""
        names = sorted(name for name in self._names() if name.startswith(_BEGINNING))
        for name in reversed(names):
            with contextlib.suppress(OSError, ValueError):  # it is being written
                return Generation.from_dict(json.loads((self.folder / name).read_text(encoding="utf-8")))
        return None

    def make(self, generation: Generation) -> bool:
        """Decide a generation; False where another node has decided it before."""
        target = self.file(generation.number)
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        write_json_atomic(beside, asdict(generation), durable=True)
        try:
            os.link(beside, target)
        except FileExistsError:
            return beside.stat().st_nlink > 1  # NFS may have lost its first answer, and refuse what it has done
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            return _write_new(target, beside)  # a file system without links
        finally:
            beside.unlink(missing_ok=True)
        fsync(self.folder)
        return True

    def say_stop(self, *, reason: str, cause: str) -> None:
        """Have all nodes stop; the first reason counts."""
        if not is_listed(self.stop_file):
            write_json_atomic(self.stop_file, {"reason": reason, "cause": cause})

    def stop(self) -> dict[str, str]:
        """Why all nodes are to stop, ``{reason, cause}``; empty: they are not."""
        return self._read(self.stop_file)

    def say_end(self, *, state: str, message: str) -> None:
        """Have nodes that wait to be taken in leave; the first word counts."""
        if not is_listed(self.end_file):
            write_json_atomic(self.end_file, {"state": state, "message": message})

    def end(self) -> dict[str, str]:
        """How the run has ended, ``{state, message}``; empty: it goes on."""
        return self._read(self.end_file)

    def nodes_seen(self) -> list[int]:
        """Those that have ever said something of themselves."""
        found = (name.removeprefix("node-").removesuffix(_END) for name in self._names() if name.startswith("node-"))
        return sorted(int(number) for number in found if number.isdigit())

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.folder)  # noqa: PTH208  names; a new listing also where NFS keeps an old one
        except FileNotFoundError:
            return []

    def _read(self, file: Path) -> dict[str, str]:
        if not is_listed(file):
            return {}
        found: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        return found


def _write_new(target: Path, source: Path) -> bool:
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        return False
    return True


def leave_if_over() -> None:
    """End this worker where the run goes on without it: before it writes anything that others read.

    It may have stood still (a network that was cut, a machine that was paused) while the other nodes went on.
    """
    following = os.environ.get(NEXT_VARIABLE)
    with contextlib.suppress(OSError):  # what is written next tells of it
        if following and is_listed(Path(following)):
            os._exit(EXIT_RESUMABLE)
