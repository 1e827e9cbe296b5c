"""Each test is a process of its own: what is tested here kills, and changes whose child is whose."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launcher.system import processes

ROOT = Path(__file__).parents[2]
ENDS_S = 90

# A parent that starts two children, each in a session of its own and deaf to polite signals, and prints their pids.
PARENT = """
import subprocess, sys, time
deaf = '''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("up", flush=True)
time.sleep(100)
'''
quiet = {"start_new_session": True, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
children = [subprocess.Popen([sys.executable, "-c", deaf], **quiet) for _ in range(2)]
for child in children:
    child.stdout.readline()
print(*(child.pid for child in children), flush=True)
time.sleep(100)
"""
PRELUDE = f"""
import json, os, subprocess, sys, time
from launcher.system import processes
PARENT = {PARENT!r}

def start_family():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    return parent, [int(pid) for pid in parent.stdout.readline().split()]

def wait_for(condition):
    while not condition():
        time.sleep(0.01)
"""


def in_a_process(code):
    """What ``code`` prints; whoever it leaves behind is killed by the test's end."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=ENDS_S,
    )
    assert done.returncode == 0, done.stderr
    return [[int(pid) for pid in line.split()] for line in done.stdout.splitlines()]


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def family():
    """Pids that must be gone when the test ends, whether it passes or not."""
    pids = []
    yield pids
    for pid in pids:
        if alive(pid):
            psutil.Process(pid).kill()


def test_every_descendant_is_killed_whatever_its_session_or_handlers(family):
    started, killed, below = in_a_process("""
parent, pids = start_family()
print(parent.pid, *pids)
print(*processes.kill_descendants())
print(*processes.descendants(os.getpid()))
""")
    family += started
    assert len(started) == 3
    assert sorted(killed) == sorted(started)
    assert below == []
    assert not any(alive(pid) for pid in started)


def test_orphans_of_a_killed_child_are_adopted_and_killed(family):
    started, adopted, killed = in_a_process("""
processes.adopt_orphans()
parent, pids = start_family()
print(*pids)
parent.kill()
parent.wait()
wait_for(lambda: len(processes.children(os.getpid())) == 2)
print(*processes.children(os.getpid()))
print(*processes.kill_descendants())
""")
    family += started
    assert sorted(adopted) == sorted(started) == sorted(killed)
    assert not any(alive(pid) for pid in started)


def test_without_adoption_orphans_would_be_out_of_reach(family):
    """What adopt_orphans is for: if this fails, the test above proves nothing."""
    started, killed = in_a_process("""
parent, pids = start_family()
print(*pids)
parent.kill()
parent.wait()
print(*processes.kill_descendants())
""")
    family += started
    assert killed == []
    assert all(alive(pid) for pid in started)


def test_nothing_to_kill_is_no_error():
    assert in_a_process("print(*processes.kill_descendants())") == [[]]


def test_processes_that_have_ended_already_are_neither_listed_nor_waited_for_again():
    children, killed = in_a_process("""
child = subprocess.Popen([sys.executable, "-c", ""])
wait_for(lambda: open(f"/proc/{child.pid}/stat").read().rpartition(")")[2].split()[0] == "Z")
print(*processes.children(os.getpid()))
print(*processes.kill_descendants())
""")
    assert (children, killed) == ([], [])


def test_children_are_direct_and_descendants_come_nearest_first(family):
    started, children, descendants, _ = in_a_process("""
parent, pids = start_family()
print(parent.pid, *pids)
print(*processes.children(os.getpid()))
print(*processes.descendants(os.getpid()))
print(*processes.kill_descendants())
""")
    family += started
    parent, *grandchildren = started
    assert children == [parent]
    assert descendants[0] == parent
    assert sorted(descendants[1:]) == sorted(grandchildren)


def test_a_program_name_with_spaces_and_brackets_is_no_problem_for_children(tmp_path):
    (script := tmp_path / ") S 1 (").write_text("#!/bin/sh\nsleep 100 &\nwait\n")
    script.chmod(0o755)
    child, children, _ = in_a_process(f"""
child = subprocess.Popen([{str(script)!r}])
wait_for(lambda: processes.children(child.pid))
print(child.pid)
print(*processes.children(os.getpid()))
print(*processes.kill_descendants())
""")
    assert children == child


def test_a_process_that_asked_for_it_dies_with_its_parent_however_that_ends(family):
    (started,) = in_a_process("""
code = '''
import time
from launcher.system import processes
processes.die_with_parent()
print("up", flush=True)
time.sleep(100)
'''
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os._exit(0)
""")
    family += started
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
        psutil.wait_procs([psutil.Process(pid) for pid in started], timeout=ENDS_S)
    assert not any(alive(pid) for pid in started)


@pytest.fixture
def collector():
    """The garbage collector as it was, when the test ends."""
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.parametrize("name", ["json", "no_such_module"])
def test_importing_holds_the_collector_only_meanwhile_and_freezes_what_came(name, collector):
    gc.unfreeze()
    with contextlib.suppress(ImportError), processes.importing():
        assert not gc.isenabled()
        importlib.import_module(name)
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def test_importing_leaves_a_collector_off_that_was_off(collector):
    gc.disable()
    with processes.importing():
        pass
    assert not gc.isenabled()
