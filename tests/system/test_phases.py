"""What is told of phases that take long: in place on a terminal, as lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from launcher.system import phases


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(phases, "TOLD_S", 0.05)
    monkeypatch.setattr(phases, "TICK_S", 0.01)


def wait_for(output, line):
    deadline = time.monotonic() + 60
    while not re.search(line, output.getvalue()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_off_a_terminal_what_takes_long_is_told_with_its_time(monkeypatch):
    output = io.StringIO()
    line = phases.Line(output)
    line.at("importing torch")
    wait_for(output, r"importing torch … \d+ s\n")
    line.at("checking images")
    line.update("3,210 of 50,000")
    line.at("checking images")  # the same phase goes on
    wait_for(output, r"checking images 3,210 of 50,000 … \d+ s\n")
    line.end()
    lines = output.getvalue().splitlines()
    assert sum(one.startswith("importing torch: ") and one.endswith(" s") for one in lines) == 1
    assert lines[-1].startswith("checking images: ")
    monkeypatch.setattr(phases, "TOLD_S", 60)
    line.at("quick")
    line.at("")
    assert output.getvalue().splitlines() == lines


def test_no_thread_is_left_when_a_phase_is_over():
    line = phases.Line(io.StringIO())
    line.at("importing torch")
    thread = line._thread
    line.end(told=False)
    assert not thread.is_alive()
    line.end()  # nothing to end


def test_another_teller_is_asked_for_a_while_and_what_it_tells_of_may_be_quick():
    output = io.StringIO()
    with phases.told_by(phases.Line(output, told_s=0.0)):
        with contextlib.suppress(ValueError), phases.during("validating") as show:
            show(1, 2)
            raise ValueError
        phases.at("making model.onnx")
    told = output.getvalue()
    assert re.fullmatch(r"validating: \d+\.\d s\n", told)  # what did not come to its end has no time
    phases.at("nobody is told")
    phases.end()
    assert output.getvalue() == told


SCRIPT = """
import sys, time
from launcher.system import console, phases
phases.SHOWN_S, phases.TICK_S = 0.0, 0.01
console.protect()
phases.show()
show = phases.counting("checking images")
show(1234, 5000)
time.sleep(0.5)
print("warning: one is blue")
time.sleep(0.5)
phases.end()
print("run a: 2 workers")
console.release()
"""


def test_on_a_terminal_the_line_is_written_in_place_and_leaves_nothing_behind():
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm"}
    done = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    output = b""
    try:
        while part := os.read(ours, 65536):
            output += part
    except OSError:  # it has ended
        pass
    os.close(ours)
    assert done.wait(60) == 0
    text = output.decode()
    assert re.search(r"\r\x1b\[2Kchecking images 1,234 of 5,000 … \d+ s", text)
    rows = [row.rpartition("\x1b[2K")[2].strip("\r") for row in text.split("\n")]
    assert rows == ["warning: one is blue", "run a: 2 workers", ""]


OTHERS = """
import os, sys, time
from launcher.system import console, phases
phases.SHOWN_S, phases.TICK_S = 0.0, 0.01
if os.fork():
    os.wait()
    os.write(1, b"\\r\\x1b[2Kbuilding the model 3 s")  # as a worker does, a moment later
    console.protect()
    console.say_over("wandb: offline")
    console.release()
else:
    try:
        with phases.told_by(phases.Line(console.stream(1))):
            phases.at("building the model")
            while not console._is_drawn: time.sleep(0.01)
            raise SystemExit
    finally:
        for one in console._outlets: one.drain()
        os._exit(0)
"""


def test_a_line_in_place_is_left_neither_by_a_worker_that_fails_nor_before_a_line_of_another_process():
    ours, theirs = pty.openpty()
    done = subprocess.Popen([sys.executable, "-c", OTHERS], stdout=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # it has ended
        while part := os.read(ours, 65536):
            output += part
    os.close(ours)
    assert done.wait(60) == 0
    expected = r"building the model … \d+ s\r\x1b\[2K\r\x1b\[2Kbuilding the model 3 s\r\x1b\[2Kwandb: offline"
    assert re.search(expected, output.decode())


def test_nothing_is_told_where_nobody_asked(capsys):
    script = "from launcher.system import phases; phases.TOLD_S = 0; phases.at('x'); import time; time.sleep(.3)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr + done.stdout == ""
