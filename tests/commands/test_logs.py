from __future__ import annotations

import ast
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.backends import living
from launcher.commands import log_lines, logs, run_end
from launcher.errors import UsageError
from launcher.runs.run_dir import RunDir
from launcher.runs.whereabouts import JobState
from launcher.system.files import append_jsonl, write_json_atomic

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

# What `launch logs` does, as a program: its arguments are those of logs.run.
PROGRAM = """
import ast, sys
from launcher.commands import logs
from launcher.errors import exit_code_of
from launcher.runs.run_dir import RunDir

def main():
    options = {"follow": False, "rank": None, "attempt": None, "pattern": None} | ast.literal_eval(sys.argv[2])
    try:
        logs.run(RunDir(sys.argv[1]), **options)
    except KeyboardInterrupt:
        return 130
    return 0

sys.exit(exit_code_of(main))
"""
# A run's ranks: on standard input, a line each, `attempt|rank|what it writes|seconds until the next`.
WRITER = """
import os, sys, time
from pathlib import Path
from launcher.runs.run_dir import RunDir

run = RunDir(sys.argv[1])
for line in sys.stdin:
    attempt, rank, text, seconds = line.rstrip("\\n").split("|")
    log = run.rank_log(int(attempt), int(rank))
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, text.encode().decode("unicode_escape").encode())
    os.close(descriptor)
    time.sleep(float(seconds))
run.update_status(state="completed")
"""


def plan_of(run, num_ranks):
    write_json_atomic(run.plan, {"run_id": "a", "name": "a", "procs_per_node": num_ranks})


def show(run, **options):
    """`launch logs` in this process."""
    logs.run(run, **{"follow": False, "rank": None, "attempt": None, "pattern": None, **options})


def write(run, attempt, rank, text, *, mode="a"):
    log = run.rank_log(attempt, rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open(f"{mode}b") as file:
        file.write(text.encode() if isinstance(text, str) else text)
    return log


def numbered(count):
    return "".join(f"line {number}\n" for number in range(count))


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    return run


@pytest.fixture
def ended(run, monkeypatch):
    """The run, at its end; that is believed sooner than by default."""
    monkeypatch.setattr(logs, "QUIET_S", 0.3)
    monkeypatch.setattr(logs, "POLL_S", 0.05)
    run.update_status(state="completed")
    return run


class Following:
    """`launch logs -f` in a process of its own, and what it has printed so far."""

    def __init__(self, run, **options):
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(run.path), repr({"follow": True, **options})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            text=True,
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            self.lines.append(line.removesuffix("\n"))

    def has_printed(self, *lines, timeout_s=60):
        """Wait until these lines are all that was printed."""
        deadline = time.monotonic() + timeout_s
        while self.lines != list(lines) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.lines == list(lines)

    def interrupt(self):
        self._process.send_signal(signal.SIGINT)

    def is_running(self):
        return self._process.poll() is None

    def end(self, timeout_s=60):
        """Wait until it has ended by itself; return the exit code and standard error."""
        code = self._process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code, self._process.stderr.read()

    def close(self):
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        self._process.stderr.close()


@pytest.fixture
def follow(run):
    following = []

    def _follow(**options):
        following.append(Following(run, **options))
        return following[-1]

    yield _follow
    for each in following:
        each.close()


# --- all that is there


def test_rank_after_rank_each_line_behind_its_aligned_rank(run, capsys):
    for rank in (10, 2, 0):
        write(run, 1, rank, f"first of {rank}\n\nthird of {rank}\n")
    show(run)
    assert capsys.readouterr().out == (
        "[ 0] first of 0\n[ 0] \n[ 0] third of 0\n"
        "[ 2] first of 2\n[ 2] \n[ 2] third of 2\n"
        "[10] first of 10\n[10] \n[10] third of 10\n"
    )


def test_the_last_attempt_that_has_logs_is_meant_and_attempts_are_numbers(run, capsys):
    for attempt in (2, 9, 10):
        write(run, attempt, 0, f"attempt {attempt}\n")
    run.attempt_logs(11).mkdir()
    show(run)
    assert capsys.readouterr().out == "[0] attempt 10\n"
    show(run, attempt=2)
    assert capsys.readouterr().out == "[0] attempt 2\n"


def test_an_attempt_that_is_not_there_is_refused_with_those_that_are(run):
    for attempt in (1, 2, 3, 7):
        write(run, attempt, 0, "x\n")
    for follow in (False, True):
        with pytest.raises(UsageError, match=r"--attempt 4: found no logs of it in .*/logs; there are 1-3, 7"):
            show(run, attempt=4, follow=follow)


def test_one_rank_alone(run, capsys):
    for rank in range(12):
        write(run, 1, rank, f"text of {rank}\n")
    show(run, rank=3)
    assert capsys.readouterr().out == "[3] text of 3\n"


def test_a_rank_that_is_not_there_is_refused_with_those_that_are(run):
    for rank in (0, 1, 2, 5):
        write(run, 2, rank, "x\n")
    for rank in (3, -1):
        for follow in (False, True):
            with pytest.raises(UsageError, match=rf"--rank {rank}: attempt 2 has no such rank; it has 0-2, 5"):
                show(run, rank=rank, follow=follow)


def test_a_rank_that_the_plan_lacks_is_not_waited_for(run):
    plan_of(run, 4)
    with pytest.raises(UsageError, match="--rank 4: the run has no such rank; it has 0-3"):
        show(run, rank=4, follow=True)


def test_many_gaps_are_not_all_listed(run):
    for rank in range(0, 100, 2):
        write(run, 1, rank, "x\n")
    with pytest.raises(UsageError, match=r"it has 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, …$"):
        show(run, rank=1)


def test_other_files_are_no_logs(run, capsys):
    write(run, 1, 0, "mine\n")
    for name in ("rank-7.log.gz", "rank-01.log", "rank-x.log", "old-rank-1.log"):
        (run.attempt_logs(1) / name).write_text("not mine\n")
    write(run, 2, 0, "not mine\n")
    run.attempt_logs(2).rename(run.logs / "attempt-2.bak")
    run.node_log(0).write_text("not mine\n")
    show(run)
    assert capsys.readouterr().out == "[0] mine\n"
    with pytest.raises(UsageError, match=r"it has 0$"):
        show(run, rank=1)


def test_a_log_that_is_removed_after_it_was_listed_is_left_out(ended, capsys, monkeypatch):
    gone = write(ended, 1, 0, "gone\n")
    write(ended, 1, 1, "here\n")
    entries = logs._rank_logs(ended, 1)
    monkeypatch.setattr(logs, "_rank_logs", lambda _run, attempt: entries if attempt == 1 else {})
    gone.unlink()
    for follow in (False, True):
        show(ended, follow=follow)
        assert capsys.readouterr().out == "[1] here\n"
    attempt = logs._AttemptLogs(ended, 1, logs._Printer(None), rank=None)
    monkeypatch.setattr(attempt, "_list", lambda: {0: (1, 5, 1)})  # and removed after that
    attempt.poll()
    attempt.finish()
    assert capsys.readouterr().out == ""


def test_grep_finds_a_regular_expression_anywhere_in_a_line(run, capsys):
    write(run, 1, 0, "loss 0.25\nlos 0.5\nval loss 0.75\n")
    write(run, 1, 1, "größe\n")
    show(run, pattern=r"lo+ss 0\.[27]")
    assert capsys.readouterr().out == "[0] loss 0.25\n[0] val loss 0.75\n"
    show(run, pattern="gr..e$")
    assert capsys.readouterr().out == "[1] größe\n"
    show(run, pattern=r"^\[0\]")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("pattern", "reason"), [("loss(", "unterminated subpattern"), ("a{99999999999999}", "repetition number")]
)
def test_a_pattern_that_is_none_is_refused_with_the_reason(pattern, reason, run):
    with pytest.raises(UsageError, match=rf"--grep {re.escape(repr(pattern))}: not a regular expression: .*{reason}"):
        show(run, pattern=pattern)


def test_no_logs_yet_is_said_in_one_line(run, capsys):
    said = f"no logs yet in {run.logs}\n"
    show(run)
    assert capsys.readouterr().out == said
    run.attempt_logs(1).mkdir()
    show(run, rank=3, attempt=2)
    assert capsys.readouterr().out == said
    run.attempt_logs(1).rmdir()
    run.logs.rmdir()
    show(run)
    assert capsys.readouterr().out == said


def test_logs_that_may_not_be_read_are_an_error_with_the_file(run, monkeypatch):
    log = write(run, 1, 0, "secret\n")

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(UsageError, match=rf"^{re.escape(str(log))}: cannot be read: Permission denied$"):
        show(run)


def test_an_unfinished_last_line_is_printed_with_a_newline(run, capsys):
    write(run, 1, 0, "whole\npart")
    write(run, 1, 1, "")
    write(run, 1, 2, "next\n")
    show(run)
    assert capsys.readouterr().out == "[0] whole\n[0] part\n[2] next\n"


def test_of_a_progress_bar_its_last_state_is_printed(run, capsys):
    write(run, 1, 0, "\r 10%\r 50%\r100%\nwindows\r\n")
    show(run)
    assert capsys.readouterr().out == "[0] 100%\n[0] windows\n"


def test_bytes_that_are_no_text_are_passed_on(run, capfdbinary):
    write(run, 1, 0, b"\xff\x00 raw\n")
    show(run)
    assert capfdbinary.readouterr().out == b"[0] \xff\x00 raw\n"
    show(run, pattern="raw")
    assert capfdbinary.readouterr().out == b"[0] \xff\x00 raw\n"


def test_what_a_terminal_cannot_encode_is_printed_all_the_same(run):
    write(run, 1, 0, "größe\n")
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii:strict"}
    arguments = [sys.executable, "-c", PROGRAM, str(run.path), "{}"]
    done = subprocess.run(arguments, env=environment, capture_output=True, check=True)
    assert done.stdout == "[0] größe\n".encode()


def test_a_log_is_printed_as_far_as_it_went_when_its_turn_came(run, capsys, monkeypatch):
    log = write(run, 1, 0, "a\nb\n")

    def line(self, rank, text, original=logs._Printer.line):
        original(self, rank, text)
        with log.open("ab") as file:  # the rank writes faster than we print
            file.write(b"more\n")

    monkeypatch.setattr(logs._Printer, "line", line)
    show(run)
    assert capsys.readouterr().out == "[0] a\n[0] b\n"


# --- long lines, many files


@pytest.mark.parametrize("follow", [False, True])
def test_a_long_line_is_cut_at_whole_characters_and_nothing_is_lost(follow, ended, capfdbinary, monkeypatch):
    monkeypatch.setattr(log_lines, "LINE_BYTES", 16)
    text = "a" + "ä€😀" * 20
    write(ended, 1, 0, f"{text}\nshort\n" + "x" * 16 + "\n" + "y" * 17 + "\n" + "z" * 32)
    show(ended, follow=follow)
    lines = [line.decode().removeprefix("[0] ") for line in capfdbinary.readouterr().out.splitlines()]
    assert all(len(line.encode()) <= 16 for line in lines)
    if follow:  # which begins with the last lines, and looks for them in ten lines' length
        assert lines[-6:] == ["short", "x" * 16, "y" * 16, "y", "z" * 16, "z" * 16]
        assert text.endswith("".join(lines[:-6]))
    else:
        assert lines[-6:] == ["short", "x" * 16, "y" * 16, "y", "z" * 16, "z" * 16]
        assert "".join(lines[:-6]) == text


def test_bytes_that_begin_no_character_are_cut_too(run, capfdbinary, monkeypatch):
    monkeypatch.setattr(log_lines, "LINE_BYTES", 16)
    write(run, 1, 0, b"\x80" * 100)
    show(run)
    assert capfdbinary.readouterr().out.replace(b"[0] ", b"").replace(b"\n", b"") == b"\x80" * 100


MEMORY_PROGRAM = """
import os, sys, threading, tracemalloc
from launcher.commands import logs
from launcher.runs.run_dir import RunDir

run, mode = RunDir(sys.argv[1]), sys.argv[2]

def grow():  # zeros without a newline that take no room on the disk
    os.truncate(run.rank_log(1, 0), 256 * 1024 * 1024)
    run.update_status(state="completed")

if mode == "appended":
    threading.Timer(0.5, grow).start()
else:
    grow()
sys.stdout = open(os.devnull, "w")
tracemalloc.start()
logs.run(run, follow=mode != "all", rank=None, attempt=None, pattern="x$")
print(tracemalloc.get_traced_memory()[1], file=sys.stderr)
"""


@pytest.mark.parametrize("mode", ["all", "tail", "appended"])
def test_a_line_of_any_length_takes_little_memory(mode, run):
    write(run, 1, 0, "")
    arguments = [sys.executable, "-c", MEMORY_PROGRAM, str(run.path), mode]
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    peak = int(done.stderr)
    print(f"peak of a line of 256 MiB, {mode}: {peak / 1024:.0f} KiB")
    assert peak < 4 * 1024 * 1024


NUM_RANKS = 8192


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A run of 8,192 ranks that has ended; some logs are large, some empty."""
    run = RunDir(tmp_path_factory.mktemp("many") / "run")
    run.create()
    run.attempt_logs(1).mkdir()
    text = "epoch 1/20  step 10/1000  loss 0.1234  top1 0.567  1234 images/s  lr 0.01\n"
    for rank in range(NUM_RANKS):
        repeats = {0: 100_000, 1: 0}.get(rank, 1 + rank % 40)
        run.rank_log(1, rank).write_text(text * repeats)
    run.update_status(state="completed")
    return run


PEAK = """
import atexit, sys

def peak():  # not ru_maxrss, which begins with what the parent had when it forked
    with open("/proc/self/status") as status:
        print(next(line.split()[1] for line in status if line.startswith("VmHWM")), file=sys.stderr)

atexit.register(peak)
"""


def measure(run, options):
    """Seconds to the first line and to the end, the number of lines, and the peak memory in MiB."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", PEAK + PROGRAM, str(run.path), repr(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    with process.stdout as out, process.stderr as errors:
        num_lines = int(bool(out.readline()))
        first_s = time.monotonic() - began
        num_lines += sum(1 for _ in out)
        peak_kb = int(errors.read())
    assert process.wait() == 0
    return first_s, time.monotonic() - began, num_lines, peak_kb / 1024


def test_thousands_of_logs_take_little_memory_and_the_first_line_no_time(many):
    empty = measure(many, {"rank": 1})[3]  # what Python and its modules take
    expected = 100_000 + sum(1 + rank % 40 for rank in range(2, NUM_RANKS))
    for options, num_lines in (({}, expected), ({"follow": True}, 10)):
        first_s, all_s, found, peak_mb = measure(many, options)
        print(
            f"{NUM_RANKS} logs, {options}: first line {first_s:.2f} s, all {found} lines {all_s:.2f} s, "
            f"peak {peak_mb:.1f} MiB (one empty log: {empty:.1f} MiB)"
        )
        assert found == num_lines
        assert peak_mb < empty + 24


def test_few_files_are_open_at_once(many):
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))\n" + PROGRAM
    arguments = [sys.executable, "-c", code, str(many.path), repr({"follow": True, "pattern": "step"})]
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 10


# --- following


def test_the_last_ten_lines_of_each_rank_come_first(ended, capsys):
    write(ended, 1, 0, numbered(12))
    write(ended, 1, 1, "only\n")
    write(ended, 1, 2, numbered(11) + "unfinished")
    show(ended, follow=True)
    assert capsys.readouterr().out.splitlines() == [
        *(f"[0] line {number}" for number in range(2, 12)),
        "[1] only",
        *(f"[2] line {number}" for number in range(2, 11)),
        "[2] unfinished",
    ]


def test_of_many_ranks_only_the_first_one_s_last_lines_come_first(ended, capsys):
    for rank in range(17):
        write(ended, 1, rank, numbered(2))
    show(ended, follow=True)
    assert capsys.readouterr().out == "[ 0] line 0\n[ 0] line 1\n"
    show(ended, follow=True, rank=16)
    assert capsys.readouterr().out == "[16] line 0\n[16] line 1\n"


def test_what_is_appended_is_merged_in_order_of_arrival(run, follow):
    for rank in range(3):
        write(run, 1, rank, f"old {rank}\n")
    following = follow()
    expected = ["[0] old 0", "[1] old 1", "[2] old 2"]
    following.has_printed(*expected)
    for rank in (2, 0, 1, 0, 2):
        write(run, 1, rank, f"now {rank}\n")
        expected.append(f"[{rank}] now {rank}")
        following.has_printed(*expected)


def test_within_one_look_the_order_is_that_of_the_last_change(run, capsys):
    printer = logs._Printer(None)
    attempt = logs._AttemptLogs(run, 1, printer, rank=None)
    for second, rank in enumerate((1, 2, 0)):
        os.utime(write(run, 1, rank, f"{rank}\n"), (second, second))
    assert attempt.poll()
    assert capsys.readouterr().out == "[1] 1\n[2] 2\n[0] 0\n"
    assert not attempt.poll()


def test_of_many_ranks_all_are_followed_and_new_ones_too(run, follow):
    for rank in range(20):
        write(run, 1, rank, f"old {rank}\nbeg")
    following = follow()
    following.has_printed("[ 0] old 0")
    write(run, 1, 19, "un\n")
    following.has_printed("[ 0] old 0", "[19] begun")
    write(run, 1, 20, "come\n")
    following.has_printed("[ 0] old 0", "[19] begun", "[20] come")


def test_one_rank_is_followed_alone(run, follow):
    plan_of(run, 2)
    write(run, 1, 0, "zero\n")
    following = follow(rank=1)  # which is in the plan, and has not begun
    time.sleep(1)
    write(run, 1, 0, "zero\n")
    write(run, 1, 1, "one\n")
    following.has_printed("[1] one")


def test_the_prefix_has_room_for_the_plan_s_ranks_from_the_start(ended, capsys):
    plan_of(ended, 1024)
    write(ended, 1, 0, "x\n")
    show(ended, follow=True)
    assert capsys.readouterr().out == "[   0] x\n"


def test_grep_while_following(run, follow):
    write(run, 1, 0, "loss 1\n" + numbered(9) + "loss 2\n")
    following = follow(pattern="loss")
    following.has_printed("[0] loss 2")
    write(run, 1, 0, "nothing\nloss 3\n")
    following.has_printed("[0] loss 2", "[0] loss 3")


def test_an_unfinished_line_waits_for_its_newline(run, follow):
    following = follow()
    said = f"no logs yet in {run.logs}; waiting for them"
    following.has_printed(said)
    for text in ("half", " and", " half"):
        write(run, 1, 0, text)
        write(run, 1, 1, f"after{text}\n")
        time.sleep(0.5)
    expected = [said, "[1] afterhalf", "[1] after and", "[1] after half"]
    following.has_printed(*expected)
    write(run, 1, 0, "\nrest")
    following.has_printed(*expected, "[0] half and half")
    run.update_status(state="failed")
    assert following.end() == (0, "")
    assert following.lines == [*expected, "[0] half and half", "[0] rest"]


def test_a_long_line_is_followed_in_pieces(run, follow):
    write(run, 1, 0, "")
    following = follow()
    write(run, 1, 0, "a" * (logs.LINE_BYTES + 5))
    following.has_printed("[0] " + "a" * logs.LINE_BYTES)
    write(run, 1, 0, "b\n")
    following.has_printed("[0] " + "a" * logs.LINE_BYTES, "[0] aaaaab")


def test_ranks_take_turns_when_much_is_there(run, capsys, monkeypatch):
    monkeypatch.setattr(log_lines, "TURN_BYTES", 4)
    attempt = logs._AttemptLogs(run, 1, logs._Printer(None), rank=None)
    for rank in (0, 1):
        os.utime(write(run, 1, rank, "a\nb\nc\nd\n"), (1, 1))
    assert attempt.poll()
    assert attempt.backlog
    assert attempt.poll()
    assert not attempt.backlog
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == [
        *("[0] a", "[0] b", "[1] a", "[1] b"),
        *("[0] c", "[0] d", "[1] c", "[1] d"),
    ]


def truncate(log):
    log.write_text("new\n")


def truncate_and_grow(log):
    log.write_text("new\n" + "longer than it was before\n" * 10)


def replace(log):
    beside = log.with_name("beside")
    beside.write_text("new\n" + log.read_text())
    beside.replace(log)


def replace_by_a_longer_copy(log):
    beside = log.with_name("beside")
    beside.write_text(log.read_text() + "new\n")
    beside.replace(log)


def remove_and_make(log):
    log.unlink()
    truncate_and_grow(log)


@pytest.mark.parametrize("change", [truncate, truncate_and_grow, replace, replace_by_a_longer_copy, remove_and_make])
def test_a_truncated_or_replaced_log_is_read_from_the_start(change, run, follow):
    log = write(run, 1, 0, "old one\nold two\n")
    following = follow()
    following.has_printed("[0] old one", "[0] old two")
    change(log)
    following.has_printed("[0] old one", "[0] old two", *(f"[0] {line}" for line in log.read_text().splitlines()))


def test_a_log_of_which_nothing_was_printed_yet_may_be_truncated_too(run, follow):
    for rank in range(20):
        write(run, 1, rank, "old\n" * 10)
    following = follow()
    following.has_printed(*["[ 0] old"] * 10)
    write(run, 1, 19, "new\nunfinished", mode="w")
    following.has_printed(*["[ 0] old"] * 10, "[19] new")
    write(run, 1, 19, "new\n", mode="w")
    following.has_printed(*["[ 0] old"] * 10, "[19] new", "[19] new")


def test_a_removed_log_may_come_again(run, follow):
    log = write(run, 1, 0, "old\n")
    os.link(log, run.path / "kept")  # or the new one may get its inode, and look as if nothing had happened
    following = follow()
    following.has_printed("[0] old")
    log.unlink()
    time.sleep(0.5)
    write(run, 1, 0, "new\n")
    following.has_printed("[0] old", "[0] new")


def test_a_new_attempt_of_a_real_writer_is_gone_over_to_and_nothing_is_lost(run, follow):
    following = follow()
    said = f"no logs yet in {run.logs}; waiting for them"
    following.has_printed(said)
    script = [
        "1|0|one zero\\n|0.5",
        "1|1|one one\\ncut|0.5",
        "2|1|two one\\n|0.5",
        "2|0|two zero\\n|0",
        "3|0|three zero\\n|0",  # attempt 3 comes and goes between two looks
        "4|0|four|0.1",
        "4|0| zero\\n|0.5",
        "4|1|end|0",
    ]
    subprocess.run(
        [sys.executable, "-c", WRITER, str(run.path)], input="\n".join(script), text=True, env=ENVIRONMENT, check=True
    )
    assert following.end() == (0, "")
    assert following.lines == [
        said,
        *("[0] one zero", "[1] one one", "[1] cut"),
        *("attempt 2 begins", "[1] two one", "[0] two zero"),
        *("attempt 3 begins", "[0] three zero"),
        *("attempt 4 begins", "[0] four zero", "[1] end"),
    ]


def test_a_chosen_attempt_is_followed_until_a_later_one_has_begun(run, follow):
    write(run, 1, 0, "first\n")
    following = follow(attempt=1)
    following.has_printed("[0] first")
    write(run, 1, 0, "more\n")
    following.has_printed("[0] first", "[0] more")
    write(run, 2, 0, "second\n")
    assert following.end() == (0, "")
    assert following.lines == ["[0] first", "[0] more"]


def test_what_a_chosen_attempt_writes_when_a_later_one_has_begun_is_printed(ended, capsys, monkeypatch):
    write(ended, 1, 0, "first\n")
    late = ["late\n"]

    def sleep(_seconds, wait=time.sleep):
        wait(0.05)
        if late:
            write(ended, 2, 0, "second\n")
            write(ended, 1, 0, late.pop())

    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    show(ended, follow=True, attempt=1)
    assert capsys.readouterr().out.splitlines() == ["[0] first", "[0] late"]


def test_a_chosen_attempt_is_waited_for_where_there_are_no_logs(run, follow):
    following = follow(attempt=2)
    said = f"no logs yet in {run.logs}; waiting for them"
    following.has_printed(said)
    write(run, 1, 0, "first\n")
    run.update_status(state="running")
    time.sleep(1.5)
    write(run, 2, 0, "second\n")
    following.has_printed(said, "[0] second")


@pytest.mark.parametrize("state", ["completed", "early_stopped", "failed", "cancelled", "preempted"])
def test_following_ends_with_the_run(state, ended, capsys):
    write(ended, 1, 0, "x\n")
    ended.update_status(state=state)
    began = time.monotonic()
    show(ended, follow=True)
    assert time.monotonic() - began >= 0.3
    assert capsys.readouterr().out == "[0] x\n"


def test_waiting_for_logs_ends_with_the_run(ended, capsys):
    show(ended, follow=True)
    assert capsys.readouterr().out == f"no logs yet in {ended.logs}; waiting for them\n"


def test_a_run_that_is_queued_again_is_followed_until_its_job_is_over(ended, capsys, monkeypatch):
    monkeypatch.setattr(run_end, "ASK_S", 0.0)
    write(ended, 1, 0, "x\n")
    ended.append_event("submitted", job_id="7")
    ended.update_status(state="preempted")
    answers = ["RUNNING", *["PENDING"] * 12, None, "RUNNING", "COMPLETED"]

    def job_state(_run):
        if len(answers) == 3:
            write(ended, 2, 0, "y\n")
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return answer and JobState(job_id="7", state=answer)

    monkeypatch.setattr(living, "job_state", job_state)
    show(ended, follow=True)
    assert capsys.readouterr().out == "[0] x\nattempt 2 begins\n[0] y\n"


def test_a_run_whose_job_died_without_a_word_is_not_followed_for_ever(ended, capsys, monkeypatch):
    ended.append_event("submitted", job_id="7")
    ended.update_status(state="running")
    monkeypatch.setattr(living, "job_state", lambda _: JobState(job_id="7", state="NODE_FAIL"))
    write(ended, 1, 0, "x\n")
    show(ended, follow=True)
    assert capsys.readouterr().out == "[0] x\n"


def test_what_is_quiet_for_long_but_not_at_an_end_is_followed(run, follow):
    write(run, 1, 0, "x\n")
    following = follow()
    following.has_printed("[0] x")
    time.sleep(1.5)
    assert following.is_running()
    run.update_status(state="completed")
    assert following.end() == (0, "")
    assert following.lines == ["[0] x"]


def test_what_ranks_say_after_the_run_s_end_is_waited_for(ended, capsys, monkeypatch):
    now, late = [0.0], list(range(5))

    def sleep(_seconds):
        now[0] += 0.9 * logs.QUIET_S
        if late:
            write(ended, 1, 1, f"{late.pop(0)}\n")

    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    write(ended, 1, 0, "x\n")
    show(ended, follow=True)
    assert capsys.readouterr().out.splitlines() == ["[0] x", *(f"[1] {number}" for number in range(5))]


def test_the_state_from_before_a_resume_is_no_end(run, follow):
    write(run, 1, 0, "x\n")
    run.update_status(state="preempted")
    for attempt, since_s in ((1, -100), (2, 1)):
        append_jsonl(run.events, {"time": time.time() + since_s, "kind": "attempt_started", "attempt": attempt})
    following = follow()
    following.has_printed("[0] x")
    time.sleep(2)
    assert following.is_running()
    run.update_status(state="completed")
    assert following.end() == (0, "")


def test_ctrl_c_ends_following_quietly(run, follow):
    write(run, 1, 0, "x\n")
    following = follow()
    following.has_printed("[0] x")
    following.interrupt()
    assert following.end() == (130, "")


@pytest.mark.parametrize("follow", [False, True])
def test_a_reader_that_has_seen_enough_ends_it_quietly(follow, run):
    write(run, 1, 0, numbered(100_000))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run.path), repr({"follow": follow})],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    process.stdout.readline()
    process.stdout.close()
    write(run, 1, 0, "more\n")
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait(60) == 0


def test_nothing_heavy_is_imported(run):
    write(run, 1, 0, "x\n")
    code = PROGRAM.replace("sys.exit(", "main(); print(sorted(sys.modules)); sys.exit(", 1)
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path), "{}"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    modules = ast.literal_eval(done.stdout.splitlines()[1])
    tops = {name.partition(".")[0] for name in modules}
    assert "launcher" in tops
    assert not tops & {"torch", "omegaconf", "pydantic", "yaml", "rich", "numpy", "submitit", "wandb"}
