"""Signals, parents and children of processes, so that no process outlives its run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
"""Each means: save at a step boundary and leave (design, "Stopping"). USR2 is SLURM's early signal."""

TELLING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
"""The stop signals, best first, for stopping another process."""

# A forked child must not collect what its parent left: a process group, for one, would wait for threads, or abort the
# child for want of them, which only the parent has.
os.register_at_fork(after_in_child=gc.freeze)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import large libraries faster, before forking.

    Python's cyclic garbage collector scans the growing heap again and again while modules are imported: that was 0.7 of
    3.9 s for torch and torchvision. What was imported is then frozen, as the gc module's own documentation
    advises before a fork: no collection in a worker looks at it, or copies its pages, again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def heeded() -> list[signal.Signals]:
    """The stop signals that this process does not ignore.

    Some may have been ignored when it was started: by nohup (HUP), ``&`` in a script (INT), ``trap '' TERM``. They stay
    ignored, here and in every process that this one starts.
    """
    return [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def telling_signal() -> signal.Signals:
    """The signal that a run's processes send each other to stop: SIGTERM, or the next that is not ignored."""
    found = heeded()
    return next((number for number in TELLING if number in found), signal.SIGTERM)


def stop_signal_for(pid: int) -> signal.Signals | None:
    """The signal to stop another process with: the first that it does not ignore; None: it ignores all."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn:")).split()[1], 16)
    return next((number for number in TELLING if not ignored >> (number - 1) & 1), None)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends for any reason."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


def offer_to_kernel(score: int) -> None:
    """When memory runs out, have the kernel kill this process, and those that it starts, before ones of lower score.

    Args:
        score: 0 to 1000 (proc(5), oom_score_adj); 0 is the default.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score), encoding="ascii")


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that :func:`kill_descendants` finds them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def start_time(pid: int) -> str | None:
    """When a process started, in the kernel's ticks: id and start time together are unique. None: it does not live."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped (SIGSTOP, a debugger) and not continued yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] in "Tt"


def children(pid: int) -> list[int]:
    """Living processes whose parent is ``pid``."""
    return _children_by_parent().get(pid, [])


def descendants(pid: int) -> list[int]:
    """All living processes below ``pid``, nearest first."""
    return _below(pid, _children_by_parent())


def _below(pid: int, by_parent: dict[int, list[int]], spared: Collection[int] = ()) -> list[int]:
    """All below a process, nearest first, without those that are spared and what is below them."""
    found, queue = [], [pid]
    while queue:
        below = [child for child in by_parent.get(queue.pop(0), []) if child not in spared]
        found += below
        queue += below
    return found


def _children_by_parent(*, dead: bool = False) -> dict[int, list[int]]:
    """Living processes by their parents; or dead ones, which these have not waited for yet."""
    by_parent: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if (state == "Z") == dead:
                    by_parent.setdefault(int(parent), []).append(int(entry.name))
    return by_parent


def kill_descendants(spared: Callable[[], Collection[int]] = tuple) -> list[int]:
    """Kill every process below this one and wait until they are gone; return their ids.

    Args:
        spared: children that live on, with all below them. Asked after each look: one may have begun meanwhile.
    """
    killed: list[int] = []
    while True:
        living = _children_by_parent()
        kept = spared()
        if not (below := _below(os.getpid(), living, kept)):
            return killed
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed += [pid for pid in below if pid not in killed]
        for pid in _children_by_parent(dead=True).get(os.getpid(), []):
            if pid not in kept:  # whoever has started that one waits for its end
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
