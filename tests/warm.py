"""`launch` in a process that is forked from one that has imported torch: imports are most of what a small run takes.

For tests of what a run does, and of what befalls it under way. How `launch` starts is tested with real starts
(commands/test_launch.py, node, slurm, test_cli.py), and `make faults` starts every run so.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.system import processes

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 280

context = multiprocessing.get_context("forkserver")
"""Its processes are forked from a clean one, which has imported torch and what supervisors and runs need."""
context.set_forkserver_preload([f"{__name__}_imports"])


class Started:
    """A ``launch …`` in a session of its own, as a subprocess.Popen is to who started it.

    Args:
        arguments: of `launch`.
        cwd: where it runs.
        env: its whole environment.
        files: what it writes to standard output and to standard error goes there; may be one.
        before: code that runs first, in the same process.
    """

    def __init__(self, arguments, *, cwd, env, files, before=""):
        for file in files:
            Path(file).touch()
        work = (list(map(str, arguments)), str(cwd), dict(env), list(map(str, files)), before)
        self._process = context.Process(target=_main, args=work)
        self._process.start()
        self.pid = self._process.pid
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            while os.getsid(self.pid) != self.pid:
                time.sleep(0.005)

    @property
    def returncode(self):
        """As Popen's."""
        return self._process.exitcode

    def poll(self):
        """As Popen's."""
        return self._process.exitcode

    def wait(self, timeout=None):
        """As Popen's."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("launch", timeout)
        return self._process.exitcode

    def send_signal(self, number):
        """As Popen's."""
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self):
        """As Popen's."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """As Popen's."""
        self.send_signal(signal.SIGKILL)


def launch(arguments, *, cwd, env, merged=False):
    """Run ``launch …`` to its end; return what subprocess.run would.

    Args:
        arguments: of `launch`.
        cwd: where it runs.
        env: its whole environment.
        merged: whether what it writes to standard error goes to standard output.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "out" if merged else "err")]
        started = Started(arguments, cwd=cwd, env=env, files=files)
        try:
            started.wait(TIMEOUT_S)
        finally:
            for pid in processes.descendants(started.pid):
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(pid, signal.SIGKILL)
            started.kill()
        told = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return subprocess.CompletedProcess(arguments, started.returncode, told[0], "" if merged else told[1])


def _main(arguments, cwd, env, files, before):
    """Be ``python -m launcher``."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # the process that this one was forked from may have looked where it is
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [str(ROOT / "launcher" / "__main__.py"), *arguments]
    sys.path.insert(0, cwd)
    exec(before, {})  # noqa: S102  a test's own
    from launcher.cli import main

    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves that out
