"""The processes that look into image files, as many as there are cores; one that dies names the file it died over."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Self

from launcher.errors import LaunchError
from launcher.images.probe import READY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from launcher.images.probe import Answer

CHUNK = 16
"""Files that a process is asked about at once; their answers fit into a pipe, so that nobody waits for the other."""
TICK_S = 0.5
NUM_STARTS = 3


class ProbePool:
    """Processes of ``launcher.images.probe``; leaving the context ends them at once.

    Args:
        paths: files to ask about.
        workers: how many processes.
    """

    def __init__(self, paths: Iterable[str], *, workers: int) -> None:
        self._todo = deque(paths)
        self._left = len(self._todo)
        self._found: queue.SimpleQueue[tuple[str, Answer] | Exception] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._processes: set[subprocess.Popen[str]] = set()
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
        """What has been answered since the last time, twice a second at least, until all is.

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
            yield answers

    def _work(self) -> None:
        """Keep one process busy; start another where it dies, and over the same file again: that file is to blame."""
        process, suspect = None, ""
        try:
            while todo := self._take():
                while todo and not self._closed:
                    process = process or self._start()
                    del todo[: self._ask(process, todo)]
                    if self._closed or not todo:
                        break
                    code, process = self._end(process), None
                    if todo[0] == suspect:
                        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
                        self._found.put(
                            (todo.pop(0), ("", "crashes_decoder", f"the decoder's process {how}", (), None))
                        )
                    else:
                        suspect = todo[0]
        except Exception as error:  # the thread that waits for the answers raises it
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
        for _ in range(NUM_STARTS):  # a signal that is meant for all of us may come before the process ignores it
            with self._lock:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,  # libraries talk about files that they read all the same
                    text=True,
                    env={**os.environ, "PYTHONPATH": path},
                )
                self._processes.add(process)
            if process.stdout and process.stdout.readline().strip() == READY:
                return process
            process.kill()
            self._end(process)
        raise LaunchError(f"the check of the images does not start; to see why: {' '.join(command)} < /dev/null")

    def _end(self, process: subprocess.Popen[str]) -> int:
        """Wait for a process that has died or is about to; return its exit code."""
        process.communicate()
        with self._lock:
            self._processes.discard(process)
        return process.returncode

    def _ask(self, process: subprocess.Popen[str], paths: list[str]) -> int:
        """Hand on the answers of a process; return how many it gave before it died."""
        if process.stdin is None or process.stdout is None:
            raise AssertionError(process)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.writelines(f"{json.dumps(path)}\n" for path in paths)
            process.stdin.flush()
        for count, path in enumerate(paths):
            line = process.stdout.readline()
            if not line.endswith("\n"):
                return count
            digest, kind, message, notes, levels = json.loads(line)
            self._found.put((path, (digest, kind, message, tuple(notes), levels and tuple(levels))))
        return len(paths)
