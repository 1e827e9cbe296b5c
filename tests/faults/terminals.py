"""The terminal goes: a run that was started so as to outlive it trains on as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil

from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from tests.faults import records
from tests.faults.bench import DEADLINE_S, EPOCHS, RECIPE, ROOT, Bench, NotHereError, Outcome, step, written
from tests.faults.processes import AT

if TYPE_CHECKING:
    from pathlib import Path

MARK = "LAUNCHER_FAULT_TERMINAL"
ATTACH = """
import fcntl, os, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp("bash", ["bash", "--norc", "-i"])
"""
"""Makes its standard input the terminal of its session."""


class Shell:
    """An interactive bash on a terminal of its own, as sshd starts one; ``hang_up`` is what a lost connection does.

    Args:
        folder: where it works.
    """

    def __init__(self, folder: Path) -> None:
        self._master, slave = os.openpty()
        self.folder = folder
        self._mark = str(folder)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if shutil.which("bash") is None:
            raise NotHereError("there is no bash")
        self._process = subprocess.Popen(
            [sys.executable, "-c", ATTACH],
            cwd=folder,
            env={**environment, MARK: self._mark},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def type(self, line: str) -> None:
        """Have a command run."""
        os.write(self._master, f"{line}\n".encode())

    def read(self) -> None:
        """Take what is shown, so that the terminal has room for more."""
        os.set_blocking(self._master, False)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._master, 1 << 16):
                pass

    def hang_up(self) -> None:
        """Close the terminal."""
        os.close(self._master)
        self._process.wait(timeout=60)

    def living(self) -> list[psutil.Process]:
        """What lives of all that was started in it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def close(self) -> None:
        """Whatever is left goes."""
        for process in self.living():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _survives(bench: Bench, start: str) -> Outcome:
    """Start a run by a line of which ``{}`` is its command, and close the terminal in the middle of it."""
    folder = bench.place("terminal")
    run = RunDir(folder / "run")
    command = [sys.executable, "-m", "launcher", str(RECIPE), f"data.path={bench.photos}", "--run-dir", "run"]
    (folder / "run.sh").write_text(f"{shlex.join(command)}; echo $? > code\n")
    shell = Shell(folder)
    try:
        shell.type(start.format("sh ./run.sh"))
        deadline = time.monotonic() + DEADLINE_S
        while not (step(run) >= AT and written(run)):
            shell.read()
            assert time.monotonic() < deadline, "it does not train"
            time.sleep(0.02)
        shell.hang_up()
        closed_at = step(run)
        while not (folder / "code").exists() or shell.living():
            assert time.monotonic() < deadline, f"it does not end: {shell.living()}"
            time.sleep(0.1)
    finally:
        shell.close()
    assert (folder / "code").read_text().strip() == "0", run.read_status()
    assert events(run, "signal") == []
    return _went_on(bench, run, f"trained on from step {closed_at}")


def _went_on(bench: Bench, run: RunDir, happened: str) -> Outcome:
    assert [e["attempt"] for e in events(run, "attempt_started")] == [1]
    assert len(events(run, "completed")) == 1
    lost = records.went_on(run, bench.undisturbed(), epochs=EPOCHS)
    return Outcome(happened=f"{happened}; exit 0, nobody left, the same bits", steps_lost=lost)


def nohup(bench: Bench) -> Outcome:
    return _survives(bench, "nohup {} &")


def disown(bench: Bench) -> Outcome:
    return _survives(bench, "{} & disown")


def setsid(bench: Bench) -> Outcome:
    return _survives(bench, "setsid {} &")


def closed_pipe(bench: Bench) -> Outcome:
    run = RunDir(bench.place("pipe") / "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", str(RECIPE), f"data.path={bench.photos}", "--run-dir", str(run.path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        process.stdout.close()  # `| head -1`
        assert process.wait(timeout=DEADLINE_S) == 0, run.read_status()
    finally:
        process.kill()
    return _went_on(bench, run, "trained on")
