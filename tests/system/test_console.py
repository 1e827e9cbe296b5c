"""What a terminal, a pipe or a full disk does with what a run prints reaches neither the run nor its exit code."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.system import console
from tests import warm
from tests.nets import FACTORY

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes/debug.yaml")
CHATTER = """
import sys, time
from launcher.system import console
from launcher.errors import exit_code_of
def main():
    console.protect()
    start = time.monotonic()
    for number in range(6000):
        print("line", number, "x" * 100, flush=True)
        print("warning", number, file=sys.stderr, flush=True)
    spent = time.monotonic() - start
    open(sys.argv[1], "w").write(str(spent))
    return 75
sys.exit(exit_code_of(main))
"""


def chatter(tmp_path, stdout, stderr=subprocess.STDOUT, **options):
    """A process that prints more than any buffer takes, and then says how long that took."""
    return subprocess.Popen(
        [sys.executable, "-c", CHATTER, str(tmp_path / "spent")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=stdout,
        stderr=stderr,
        **options,
    )


def closed_pipe():
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def closed_terminal():
    master, slave = os.openpty()
    os.close(master)
    return slave


@pytest.mark.parametrize(
    "where",
    [
        closed_pipe,
        closed_terminal,
        lambda: os.open("/dev/full", os.O_WRONLY),
        lambda: os.open("/dev/null", os.O_RDONLY),
    ],
    ids=["closed pipe", "closed terminal", "full disk", "not writable"],
)
def test_an_output_that_takes_nothing_changes_nothing(where, tmp_path):
    descriptor = where()
    try:
        process = chatter(tmp_path, descriptor)
        assert process.wait(timeout=120) == 75
    finally:
        os.close(descriptor)
    assert (tmp_path / "spent").exists()


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_an_output_that_nobody_reads_delays_nothing(kind, tmp_path):
    reader, writer = os.pipe() if kind == "pipe" else os.openpty()
    try:
        process = chatter(tmp_path, writer)
        assert process.wait(timeout=120) == 75
        assert float((tmp_path / "spent").read_text()) < 60
    finally:
        os.close(reader)
        os.close(writer)


def test_closed_streams_give_no_file_to_print_into(tmp_path):
    process = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {tmp_path / "spent"} <&- >&- 2>&-', sys.executable, CHATTER],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=120,
    )
    assert process.returncode == 75
    assert float((tmp_path / "spent").read_text()) < 60  # and not a line of the chatter


def test_a_slow_reader_gets_the_newest_and_is_told_how_much_it_lost(tmp_path):
    reader, writer = os.pipe()
    outlet = console.Outlet(writer)
    for number in range(5000):
        outlet.write(b"%d %s\n" % (number, b"x" * 100))
    time.sleep(0.2)  # the pipe is full
    read = b""
    while b"\n4999 " not in read:
        read += os.read(reader, 1 << 16)
    numbers = [int(line.split()[0]) for line in read.splitlines() if line[:1].isdigit()]
    assert numbers == sorted(numbers)
    told = [int(line[1:].split()[0]) for line in read.splitlines() if line.startswith(b"[")]
    assert sum(told) == 5000 - len(numbers) > 2000
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    "command", [["models"], ["recipes"], ["schema"], ["--help"], ["ps", "/"], [RECIPE, "--dry-run"]], ids=lambda c: c[0]
)
def test_a_reader_that_has_seen_enough_ends_an_answer_without_a_word(command):
    write_end = closed_pipe()
    process = subprocess.run(
        [sys.executable, "-m", "launcher", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": ""},
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
    )
    os.close(write_end)
    assert (process.returncode, process.stderr) == (0, "")


def test_an_answer_that_the_disk_does_not_take_is_an_error():
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "launcher", "recipes"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    assert (process.returncode, process.stderr) == (1, "error: standard output: No space left on device\n")


@pytest.mark.slow
@pytest.mark.timeout(900)  # exports take minutes on a busy machine
@pytest.mark.parametrize("reads", ["one line", "until it is trained", "nothing"])
def test_a_run_without_a_reader_is_trained_exported_and_reported(reads, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    if reads == "nothing":  # and the pipe is full from the start
        with contextlib.suppress(BlockingIOError):
            while os.write(writer, bytes(4096)):
                pass
    process = warm.Started(
        [RECIPE, FACTORY, "post.quantize=[]", "tracking.log_every=1", "--run-dir", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        files=(pipe, pipe),
    )
    run = RunDir(tmp_path / "run")
    os.set_blocking(reader, True)
    if reads == "one line":
        os.read(reader, 1)
    elif reads == "until it is trained":
        while events(run, "training_ended") == [] and process.poll() is None:
            time.sleep(0.02)
    os.close(writer)
    if reads != "nothing":
        os.close(reader)
    assert process.wait(timeout=800) == 0
    assert run.read_status()["state"] == "completed"
    assert (run.exports / "model.onnx").exists()
    assert run.report_html.exists()
    (completed,) = events(run, "completed")
    assert completed["exported"]
    assert [e["attempt"] for e in events(run, "attempt_started")] == [1]
    assert "val" in run.rank_log(1, 0).read_text()  # the log has what the console lost
    if reads == "nothing":
        os.close(reader)
