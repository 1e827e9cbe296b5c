"""Several processes that serve at one socket, and their parent, which starts a lost one again and passes on signals.

``python -m launcher.tools.serving.workers SETTINGS SOCKET READY GOES_ON`` is one of them; the numbers are open files.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

from launcher.errors import EXIT_FAILED, EXIT_OK, exit_code_of
from launcher.system import processes
from launcher.tools.serving.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client reads it when it is imported."""
POLL_S = 0.1
PAUSE_S = 1.0
"""A process that was lost is started again after so long."""


def serve(settings: Settings, listening: socket.socket, tell: Callable[[], None]) -> int:
    """Serve with ``settings.workers`` processes until a signal says to stop; return the exit code.

    Args:
        settings: of the server.
        listening: the socket, which they share.
        tell: is called once all of them are ready.
    """
    with tempfile.TemporaryDirectory(prefix="launch-serve-") as folder:
        parent = _Parent(settings, listening, folder)
        for number in processes.heeded():
            signal.signal(number, parent.told)
        try:
            return parent.watch(tell)
        finally:
            parent.kill()


class _Parent:
    """Keeps the processes running.

    Args:
        settings: of the server.
        listening: the socket.
        folder: where they put their counts together.
    """

    def __init__(self, settings: Settings, listening: socket.socket, folder: str) -> None:
        self._settings = settings
        self._listening = listening
        self._environment = os.environ | {METRICS_VARIABLE: folder}
        self._folder = folder
        self._ready, self._say_ready = os.pipe()
        self._goes_on, self._until_stop = os.pipe()  # at its end once this process stops, or is gone
        for pipe in (self._ready, self._goes_on):
            os.set_blocking(pipe, False)
        self._running: list[subprocess.Popen[bytes]] = []
        self._is_stopping = False

    def told(self, number: int, _: FrameType | None) -> None:
        """Pass a signal on; after a second one nothing is waited for."""
        if self._is_stopping:
            print("a second signal: requests that are under way are dropped", file=sys.stderr, flush=True)
            sys.exit(128 + number)
        self._is_stopping = True
        os.close(self._until_stop)

    def watch(self, tell: Callable[[], None]) -> int:
        """Start the processes, and again those that are lost; return the exit code once all have ended."""
        self._running = [self._start() for _ in range(self._settings.workers)]
        num_ready = 0
        while not self._is_stopping:
            time.sleep(POLL_S)
            if num_ready < self._settings.workers:
                num_ready += self._news()
                if num_ready == self._settings.workers:
                    tell()
            lost = [worker for worker in self._running if worker.poll() is not None]
            if lost and num_ready < self._settings.workers:  # it would be lost again: its own words are on the screen
                return lost[0].returncode if lost[0].returncode > 0 else EXIT_FAILED
            for worker in lost:
                self._replace(worker)
        self._listening.close()
        for worker in self._running:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(signal.SIGTERM)
        codes = {worker.wait() for worker in self._running}
        return EXIT_FAILED if codes - {EXIT_OK, -signal.SIGTERM} else EXIT_OK  # by SIGTERM: it had hardly begun

    def _start(self) -> subprocess.Popen[bytes]:
        passed = [self._listening.fileno(), self._say_ready, self._goes_on]
        command = [sys.executable, "-m", __name__, self._settings.to_json(), *map(str, passed)]
        return subprocess.Popen(
            command,
            env=self._environment,
            pass_fds=passed,
            start_new_session=True,  # a Ctrl-C at the terminal is for the parent
        )

    def _news(self) -> int:
        """How many processes have become ready."""
        try:
            return len(os.read(self._ready, self._settings.workers))
        except BlockingIOError:
            return 0

    def _replace(self, lost: subprocess.Popen[bytes]) -> None:
        from prometheus_client.multiprocess import mark_process_dead

        print(f"a process was lost (exit code {lost.returncode}); starting another", file=sys.stderr, flush=True)
        mark_process_dead(lost.pid, self._folder)  # type: ignore[no-untyped-call]
        time.sleep(PAUSE_S)
        self._running[self._running.index(lost)] = self._start()

    def kill(self) -> None:
        """End all of them at once."""
        for worker in self._running:
            if worker.poll() is None:
                worker.kill()


def main() -> int:
    """Be one of the processes."""
    from launcher.tools.serving import server

    processes.die_with_parent(signal.SIGTERM)
    settings, (number, say_ready, goes_on) = Settings.from_json(sys.argv[1]), map(int, sys.argv[2:])
    listening = socket.socket(fileno=number)

    def tell() -> None:
        os.write(say_ready, b"r")

    def all_stop() -> bool:
        try:
            return not os.read(goes_on, 1)
        except BlockingIOError:
            return False

    server.serve(settings, listening, tell, all_stop)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
