"""Starts and ends the processes that track a run: beside its training, or on a machine that only sees its files."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Self

from launcher.errors import EXIT_OK, EXIT_RESUMABLE
from launcher.system.processes import STOP_SIGNALS, descendants
from launcher.tracking import sink as sinks
from launcher.tracking import wandb_folder, wandb_mode
from launcher.tracking.place import is_taken

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir

FINISH_S = 60.0
"""Seconds that the end of a run waits for what was not sent yet: its best checkpoint and exports, too."""
FAILED_S = 10.0
"""The same where training failed."""
STOPPED_S = 2.0
"""The same after a stop signal."""
SILENT_S = 2.0
"""Say what is waited for after so long."""
MOST_STARTS = 4
"""Start a tracker this often at most where it is killed."""
POLL_S = 0.1


class Trackers:
    """Processes that track one run, one for each sink: one that hangs holds up no other.

    Args:
        run: the run directory.
        names: of the sinks.
        say: called with each line of theirs, in a thread.
        beside: whether training runs on this machine.
        mode: of wandb; None: the recipe's.
        stop: whether a stop signal came; nothing is then waited for.
    """

    def __init__(
        self,
        run: RunDir,
        names: Sequence[str],
        *,
        say: Callable[[str], None],
        beside: bool,
        mode: str | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._make = functools.partial(_Tracker, run, say=say, beside=beside, mode=mode)
        self._trackers = [self._make(name) for name in names]
        self._say = say
        self._stop = stop
        self._is_over = False

    def __enter__(self) -> Self:
        """Start them."""
        for tracker in self._trackers:
            tracker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """End them, soon where something has gone wrong."""
        self.finish(FINISH_S if kind is None else FAILED_S)

    @property
    def codes(self) -> list[int]:
        """How each has ended."""
        return [tracker.code for tracker in self._trackers]

    @property
    def alive(self) -> bool:
        """Whether one is at work."""
        return any(tracker.is_alive() for tracker in self._trackers)

    def pids(self) -> list[int]:
        """Ids of the processes."""
        return [pid for tracker in self._trackers if (pid := tracker.pid)]

    def take_over(self, names: Sequence[str]) -> list[str]:
        """Start those for these sinks that are not at work here; return the names.

        Where another node's is at work, it says so and leaves.
        """
        alive = {tracker.name: tracker for tracker in self._trackers if tracker.is_alive()}
        lacking = [name for name in names if name not in alive]
        started = [self._make(name) for name in lacking]
        self._trackers = [*alive.values(), *started]
        for tracker in started:
            tracker.start()
        return lacking

    def finish(self, timeout_s: float | None = FINISH_S) -> None:
        """Tell them that the run is over, and wait until all is sent; then kill what is left.

        Args:
            timeout_s: how long to wait; None: as long as it takes.
        """
        if self._is_over:
            return
        self._is_over = True
        for tracker in self._trackers:
            tracker.tell_over()
        began, told = time.monotonic(), False
        while alive := [tracker.name for tracker in self._trackers if tracker.is_alive()]:
            waited = time.monotonic() - began
            limit = STOPPED_S if self._stop() else timeout_s
            if limit is not None and waited > limit:
                break
            if waited > SILENT_S and not told and limit != STOPPED_S:
                at_most = f" (for {limit:g} s at most)" if limit is not None else ""
                self._say(f"{', '.join(alive)}: sending the rest{at_most}")
                told = True
            time.sleep(POLL_S)
        for tracker in self._trackers:
            tracker.give_up(time.monotonic() - began)


class _Tracker(threading.Thread):
    """One process, and the thread that hands on its lines and starts it again where it is killed."""

    def __init__(self, run: RunDir, sink: str, *, say: Callable[[str], None], beside: bool, mode: str | None) -> None:
        super().__init__(name=f"tracking with {sink}", daemon=True)
        self.name = sink
        self.code = EXIT_OK
        self._run = run
        self._say = say
        self._command = [sys.executable, "-m", "launcher.tracking", str(run.path), sink]
        self._command += ["--beside"] if beside else []
        self._command += ["--mode", mode] if mode else []
        self._process: subprocess.Popen[str] | None = None
        self._is_over = self._is_given_up = False
        self._changing = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of the process; None: there is none."""
        with self._changing:
            return self._process.pid if self._process and self._process.returncode is None else None

    def run(self) -> None:
        """Start it, until it ends by itself or was started often enough."""
        # Inherited by it and by what it starts, from their first instruction on: a stop is for training, and the
        # tracker then still has to send the last steps. (wandb-core alone takes INT and TERM again, if told itself.)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for start in range(1, MOST_STARTS + 1):
            self.code = self._carry_out()
            if self._is_given_up or not (self.code < 0 or self.code == EXIT_RESUMABLE):
                return
            killed = (
                f"{self.name}: its tracker was killed ({signal.Signals(-self.code).name})"
                if self.code < 0
                else f"{self.name}: a process of its tracker was killed"
            )
            if start == MOST_STARTS:
                self._say(f"{killed} {start} times; `{self._cure()}` goes on from here")
                return
            self._say(f"{killed}; it is started again, and goes on from here")

    def tell_over(self) -> None:
        """Tell it that the run is over."""
        with self._changing:
            self._is_over = True
            self._tell()

    def give_up(self, waited_s: float) -> None:
        """Kill it where it has not ended, with what it started."""
        process = self._process
        if process is None or not self.is_alive():
            return
        self._is_given_up = True
        for pid in (process.pid, *descendants(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.join(STOPPED_S)
        if self.name == "wandb" and (folder := wandb_folder.newest_online(self._run)):
            with contextlib.suppress(OSError):  # a full disk
                self._run.append_event(wandb_folder.UNSYNCED, folder=folder.name, reason="given up at the end")
        self._say(f"{self.name}: not done after {waited_s:.0f} s and given up; `{self._cure()}` sends the rest")

    def _carry_out(self) -> int:
        """Start it and hand its lines on until it ends; return its exit code."""
        with self._changing:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C is for training
            )
            if self._is_over:
                self._tell()
        assert self._process.stdout  # noqa: S101  as asked for
        with self._process:  # which waits for its end
            for line in self._process.stdout:
                self._say(line.rstrip("\n"))
        return self._process.returncode

    def _tell(self) -> None:
        """By a byte: the pipe's end may be held open by processes that were forked meanwhile."""
        if self._process and self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(OSError):  # it has ended
                self._process.stdin.write(".")
                self._process.stdin.close()

    def _cure(self) -> str:
        return f"launch track {shlex.quote(str(self._run))} --{self.name}"


def beside(run: RunDir, recipe: Recipe, *, say: Callable[[str], None], stop: Callable[[], bool]) -> Trackers:
    """The trackers that a recipe asks for, beside its training; what cannot be is said in a line."""
    return Trackers(run, possible(recipe, say), say=say, beside=True, stop=stop)


def possible(recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> list[str]:
    """The sinks that a recipe asks for, without those for which no process is worth starting."""
    return [name for name in dict.fromkeys(recipe.tracking.backends) if _is_possible(name, recipe, say)]


def send_once(run: RunDir, recipe: Recipe, *, say: Callable[[str], None], timeout_s: float) -> None:
    """Send what has come after training, such as exports, where nobody tracks the run now."""
    names = [name for name in recipe.tracking.backends if run.tracked(name).exists() or name == "wandb"]
    taken = {name for name in names if is_taken(run, name) or is_taken(run, f"{name}-offline")}
    names = [name for name in names if name not in taken and _is_possible(name, recipe, lambda _: None)]
    with Trackers(run, names, say=say, beside=False) as trackers:
        trackers.finish(timeout_s)


def _is_possible(name: str, recipe: Recipe, say: Callable[[str], None]) -> bool:
    """Whether a process is worth starting."""
    if problem := sinks.lacking(name):
        say(problem)
        return False
    if name != "wandb":
        return True
    mode = wandb_mode.asked_mode(recipe.tracking.wandb.mode)
    reason = wandb_mode.why_off(mode)
    if reason:
        say(f"wandb: off: {reason}")
    return mode != "disabled" and not reason
