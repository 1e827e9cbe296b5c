"""The processes that read image files, as many as there are cores. Where one dies or hangs, its file is bad, no other.

concurrent.futures gives up all tasks where a process dies; pebble does not, but was slower (CHANGELOG has the figures).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Self

from launcher.errors import LaunchError
from launcher.images.probe import READY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from launcher.images.probe import Answer

CHUNK = 16
"""Files that a process is asked about at once. Their answers fit into a pipe, so it need not wait for its reader."""
TICK_S = 0.5
"""Seconds between two answers of :meth:`ProbePool.answers`, at most."""
ANSWER_S = 60.0
"""Kill a process that works on one file for longer; at the second time the file is bad."""
NUM_STARTS = 3
"""Give up after so many starts of a process that does not begin to answer."""


class ProbePool:
    """Processes that run ``launcher.images.probe``. Leaving the context ends them at once.

    Args:
        paths: files to read.
        workers: how many processes.
    """

    def __init__(self, paths: Iterable[str], *, workers: int) -> None:
        self._todo = deque(paths)
        self._left = len(self._todo)
        self._found: queue.SimpleQueue[tuple[str, Answer] | Exception] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._processes: set[subprocess.Popen[str]] = set()
        self._asked: dict[subprocess.Popen[str], float] = {}
        """When each process began with the file that it works on, by the monotonic clock."""
        self._hung: set[subprocess.Popen[str]] = set()
        self._threads = [threading.Thread(target=self._work, name=f"image-probe-{i}") for i in range(workers)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            self._todo.clear()
            for process in self._processes:
                process.kill()
        for thread in self._threads:
            thread.join()

    def answers(self) -> Iterator[list[tuple[str, Answer]]]:
        """Yield the answers since the last time, at least twice a second, until there is one for each file.

        Raises:
            LaunchError: the processes do not start.
        """
        while self._left:
            batch = []
            with contextlib.suppress(queue.Empty):
                batch.append(self._found.get(timeout=TICK_S))
                while True:
                    batch.append(self._found.get_nowait())
            answers = []
            for item in batch:
                if isinstance(item, Exception):
                    raise item
                answers.append(item)
            self._left -= len(answers)
            self._kill_hung()
            yield answers

    def _work(self) -> None:
        """Keep one process busy. Where it dies, start another; where that dies over the same file, the file is bad."""
        process, suspect = None, ""
        try:
            while todo := self._take():
                while todo and not self._closed:
                    process = process or self._start()
                    del todo[: self._ask(process, todo)]
                    if self._closed or not todo:
                        break
                    how, process = self._end(process), None
                    if todo[0] == suspect:
                        self._found.put((todo.pop(0), ("", "crashes_decoder", how, (), None)))
                    else:
                        suspect = todo[0]
        except Exception as error:  # answers() raises it
            self._found.put(error)
        finally:
            if process:
                process.kill()
                self._end(process)

    def _take(self) -> list[str]:
        with self._lock:
            return [self._todo.popleft() for _ in range(min(CHUNK, len(self._todo)))]

    def _start(self) -> subprocess.Popen[str]:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-P", "-m", "launcher.images.probe"]
        for _ in range(NUM_STARTS):  # a signal to the whole process group may come before the process ignores it
            with self._lock:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,  # libraries warn of files that they can read
                    text=True,
                    env={**os.environ, "PYTHONPATH": path},
                )
                self._processes.add(process)
            if process.stdout and process.stdout.readline().strip() == READY:
                return process
            process.kill()
            self._end(process)
        raise LaunchError(f"the check of the images does not start; to see why: {' '.join(command)} < /dev/null")

    def _end(self, process: subprocess.Popen[str]) -> str:
        """Wait for a process that has died or is about to; return how it ended, in words."""
        process.communicate()
        with self._lock:
            self._processes.discard(process)
        if process in self._hung:
            return f"the decoder did not end within {ANSWER_S:g} s"
        code = process.returncode
        return f"the decoder's process {f'was killed by signal {-code}' if code < 0 else f'ended with {code}'}"

    def _ask(self, process: subprocess.Popen[str], paths: list[str]) -> int:
        """Pass on the answers of a process; return how many it gave before it died."""
        if process.stdin is None or process.stdout is None:
            raise AssertionError(process)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.writelines(f"{json.dumps(path)}\n" for path in paths)
            process.stdin.flush()
        try:
            for count, path in enumerate(paths):
                self._asked[process] = time.monotonic()
                line = process.stdout.readline()
                if not line.endswith("\n"):
                    return count
                digest, kind, message, notes, levels = json.loads(line)
                self._found.put((path, (digest, kind, message, tuple(notes), levels and tuple(levels))))
        finally:
            del self._asked[process]
        return len(paths)

    def _kill_hung(self) -> None:
        now = time.monotonic()
        for process, since in list(self._asked.items()):
            if now - since > ANSWER_S:
                self._hung.add(process)
                process.kill()
