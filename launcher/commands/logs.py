"""``launch logs``: what a run's ranks wrote, one after the other or as it arrives."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import sys
import time
from typing import TYPE_CHECKING

from launcher.commands.log_lines import LINE_BYTES, RankLog, read_lines
from launcher.commands.parser import parser_of
from launcher.commands.run_end import Ending
from launcher.errors import EXIT_OK, UsageError
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path


TAIL_LINES = 10
"""Show this many of a rank's last lines before new ones."""
TAIL_RANKS = 16
"""With more ranks than this, only the first rank's last lines are shown: they say the same, and fill the screen."""
POLL_S = 0.2
QUIET_S = 1.0
"""Stop following an ended run after this many seconds without a new line."""

_MAX_RANGES = 10
_ATTEMPT = re.compile(r"attempt-([1-9][0-9]*)")
_RANK = re.compile(r"rank-(0|[1-9][0-9]*)\.log")


def main(argv: Sequence[str]) -> int:
    """Run ``launch logs``; return its exit code."""
    parser = parser_of("logs", "Print what the ranks of a run wrote, each line with its rank.")
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is appended, until the run ends")
    parser.add_argument("--rank", type=int, metavar="R", help="only this rank (default: all)")
    parser.add_argument("--attempt", type=int, metavar="A", help="this attempt (default: the last)")
    parser.add_argument("--grep", metavar="X", help="only lines in which this regular expression is found")
    args = parser.parse_args(argv)
    found = RunDir.existing(args.run_dir)
    try:
        run(found, follow=args.follow, rank=args.rank, attempt=args.attempt, pattern=args.grep)
    except KeyboardInterrupt:  # the usual end of following: nothing to say
        return 128 + signal.SIGINT
    return EXIT_OK


def run(run: RunDir, *, follow: bool, rank: int | None, attempt: int | None, pattern: str | None) -> None:
    """Print the logs of a run's ranks, each line behind its rank: ``[12] text``.

    Without ``follow``: all lines of the last attempt that has logs, rank after rank, each up to its size at
    that moment. Lines have no times by which they could be merged.

    With ``follow``: first the last 10 lines of each rank, or of the first rank only where there are more than 16; then
    what any rank appends, in order of arrival. A new attempt is gone over to when it begins. It ends when the run has
    ended, by its own word or that of its SLURM job, and nothing was appended for a second; while it is queued
    again the next attempt is waited for. A log that is truncated or replaced is printed again from its start.

    A line is printed when its newline has arrived, or when its log is at an end. A line of more than 64 KiB is printed,
    and searched, in pieces, each like a line of its own. Of a line with carriage returns (a progress bar) only what
    follows the last one is printed. Other bytes are passed on as they are.

    Args:
        run: the run directory.
        follow: go on with what is appended. Where there are no logs yet: wait for them.
        rank: only this rank. One that the plan has, but that wrote nothing yet, is waited for with ``follow``.
        attempt: this attempt instead of the last one; following then ends when a later one has begun.
        pattern: print only lines in which this regular expression is found, as `| grep` would: the last 10 lines are
            chosen before.

    Raises:
        UsageError: no such rank or attempt, a pattern that is none, or logs that may not be read.
        KeyboardInterrupt: Ctrl-C, the usual end of following; nothing is to be said, and the exit code is 130.
    """
    printer = _Printer(pattern)
    try:
        if follow:
            _follow(run, printer, rank=rank, attempt=attempt)
        else:
            _print_all(run, printer, rank=rank, attempt=attempt)
    except PermissionError as error:
        raise UsageError(f"{error.filename}: cannot be read: {error.strerror}") from None


class _Printer:
    """Standard output, in bytes: a log may hold anything, and a terminal's encoding may lack some of it."""

    def __init__(self, pattern: str | None) -> None:
        try:
            self._pattern = None if pattern is None else re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"--grep {pattern!r}: not a regular expression: {error}") from None
        sys.stdout.flush()
        self._out = sys.stdout.buffer
        self._flush_each = self._pattern is not None and sys.stdout.isatty()
        self._width = 1

    def make_room_for(self, rank: int) -> None:
        """Make prefixes as wide as this rank's."""
        self._width = max(self._width, len(str(rank)))

    def line(self, rank: int, line: bytes) -> None:
        """Print a line, with or without its newline, if it is wanted."""
        text = line.rstrip(b"\r\n").rpartition(b"\r")[2]
        if self._pattern is None or self._pattern.search(text.decode("utf-8", errors="replace")):
            self._out.write(b"[%*d] %b\n" % (self._width, rank, text))
            if self._flush_each:
                self._out.flush()

    def note(self, text: str) -> None:
        """Print a line of our own."""
        self._out.write(f"{text}\n".encode())
        self._out.flush()

    def flush(self) -> None:
        """Let the reader have it."""
        self._out.flush()


def _print_all(run: RunDir, printer: _Printer, *, rank: int | None, attempt: int | None) -> None:
    chosen = _choose_attempt(run, attempt)
    if chosen is None:
        printer.note(f"no logs yet in {run.logs}")
        return
    there = _rank_logs(run, chosen)
    if rank is not None and rank not in there:
        raise _no_such_rank(chosen, rank, there)
    ranks = sorted(there) if rank is None else [rank]
    printer.make_room_for(ranks[-1])
    for number in ranks:
        try:
            with run.rank_log(chosen, number).open("rb", buffering=LINE_BYTES) as file:
                for line, _ in read_lines(file, os.fstat(file.fileno()).st_size):
                    printer.line(number, line)
        except FileNotFoundError:  # removed since it was listed
            continue
        printer.flush()


def _follow(run: RunDir, printer: _Printer, *, rank: int | None, attempt: int | None) -> None:
    chosen = _choose_attempt(run, attempt)
    world_size = _world_size(run)
    there = {*range(world_size), *(_rank_logs(run, chosen) if chosen else ())}
    if rank is not None and there and rank not in there:
        raise _no_such_rank(chosen, rank, there)
    printer.make_room_for(max(world_size - 1, 0) if rank is None else rank)
    if chosen is None:
        printer.note(f"no logs yet in {run.logs}; waiting for them")
    logs = _AttemptLogs(run, chosen or 0, printer, rank=rank)
    logs.print_tails()
    ending, quiet_since = Ending(run), time.monotonic()
    while True:
        began = time.monotonic()
        later = _attempts(run, after=logs.attempt)
        appended = logs.poll()
        if later and (attempt is None or attempt in later):
            logs.finish()
            begun = later[0] if attempt is None else attempt
            if logs.attempt:
                printer.note(f"attempt {begun} begins")
            logs = _AttemptLogs(run, begun, printer, rank=rank)
            appended = logs.poll()
        was_left = attempt is not None and later[-1:] > [attempt]
        if appended or not (was_left or ending.has_come()):
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since >= QUIET_S:
            logs.finish()
            return
        if not logs.backlog:  # at most half of the time is spent on asking a shared file system
            time.sleep(max(POLL_S, time.monotonic() - began))


class _AttemptLogs:
    """The logs of one attempt, while they are written; attempt 0 is none."""

    def __init__(self, run: RunDir, attempt: int, printer: _Printer, *, rank: int | None) -> None:
        self.attempt = attempt
        self._run = run
        self._printer = printer
        self._only = rank
        self._logs: dict[int, RankLog] = {}

    @property
    def backlog(self) -> bool:
        """Whether a log is known to have more than was printed."""
        return any(log.backlog for log in self._logs.values())

    def print_tails(self) -> None:
        """Print the last lines of what is there, and take the rest for read."""
        listed = self._list()
        self._printer.make_room_for(max(listed, default=0))
        for position, rank in enumerate(sorted(listed)):
            is_shown = position == 0 or len(listed) <= TAIL_RANKS
            size = listed[rank][1]
            log = RankLog(offset=size, tail=TAIL_LINES if is_shown else 0, size=size, seen=listed[rank])
            self._logs[rank] = log
            if is_shown:
                self._print_new(rank, log)

    def poll(self) -> bool:
        """Print what was appended since the last time; return whether anything was."""
        changed = []
        for rank, seen in self._list().items():
            log = self._logs.get(rank)
            if log is None:
                log = self._logs[rank] = RankLog()
                self._printer.make_room_for(rank)
            if log.seen != seen or log.backlog:
                log.seen = seen
                changed.append((seen[2], rank))
        for _, rank in sorted(changed):
            self._print_new(rank, self._logs[rank])
        return bool(changed)

    def finish(self) -> None:
        """Print the rest, unfinished last lines too.

        Every log is opened: a shared file system may list old sizes, but opens a file as it is.
        """
        self.poll()
        for rank, log in sorted(self._logs.items()):
            self._print_new(rank, log, at_end=True)
            while log.backlog:
                self._print_new(rank, log, at_end=True)

    def _print_new(self, rank: int, log: RankLog, *, at_end: bool = False) -> None:
        try:
            with self._run.rank_log(self.attempt, rank).open("rb", buffering=LINE_BYTES) as file:
                for line in log.new_lines(file, at_end=at_end):
                    self._printer.line(rank, line)
        except FileNotFoundError:  # removed; where it comes again, it is a new one
            log.backlog = False
        self._printer.flush()

    def _list(self) -> dict[int, tuple[int, int, int]]:
        """Inode, size and time of the last change of every log that is followed."""
        listed = {}
        for rank, entry in _rank_logs(self._run, self.attempt).items():
            if self._only in (None, rank):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                listed[rank] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return listed


def _attempts(run: RunDir, *, after: int = 0) -> list[int]:
    """The attempts that have logs, in order."""
    found = (attempt for attempt, _ in _numbered(run.logs, _ATTEMPT) if attempt > after)
    return sorted(attempt for attempt in found if any(_numbered(run.attempt_logs(attempt), _RANK)))


def _rank_logs(run: RunDir, attempt: int) -> dict[int, os.DirEntry[str]]:
    return dict(_numbered(run.attempt_logs(attempt), _RANK))


def _numbered(folder: Path, name: re.Pattern[str]) -> Iterator[tuple[int, os.DirEntry[str]]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if match := name.fullmatch(entry.name):
                yield int(match[1]), entry


def _choose_attempt(run: RunDir, attempt: int | None) -> int | None:
    """The attempt that is meant; None where there are no logs at all."""
    there = _attempts(run)
    if attempt is not None and there and attempt not in there:
        raise UsageError(f"--attempt {attempt}: found no logs of it in {run.logs}; there are {_ranges(there)}")
    return (attempt or there[-1]) if there else None


def _no_such_rank(attempt: int | None, rank: int, there: Iterable[int]) -> UsageError:
    where = f"attempt {attempt}" if attempt else "the run"
    return UsageError(f"--rank {rank}: {where} has no such rank; it has {_ranges(there)}")


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7``."""
    ranges = []
    for _, group in itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        ranges.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(ranges[:_MAX_RANGES] + ["…"] * (len(ranges) > _MAX_RANGES))


def _world_size(run: RunDir) -> int:
    """How many ranks the plan has; 0 where there is none yet."""
    try:
        return run.read_plan().world_size
    except FileNotFoundError:
        return 0
