"""The kinds of errors, each with its exit code (the codes are a public contract, see docs/command-line.md)."""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import stat
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from launcher.system import console, phases
from launcher.system.redact import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREFLIGHT = 3
EXIT_RESUMABLE = 75


class LaunchError(Exception):
    """The base of every error that ``launch`` explains to the user instead of showing a traceback."""

    exit_code: ClassVar[int] = EXIT_FAILED


class UsageError(LaunchError):
    """The command line, or a file that it names, is wrong; nothing was written or started."""

    exit_code = EXIT_USAGE


class TrainingError(LaunchError):
    """Training or its post-step failed."""


class MachineError(TrainingError):
    """The machine, or the shell that started the run, lacks what training needs: shared memory, open files, disk."""


class PreflightError(LaunchError):
    """A check of the machine failed; nothing was started."""

    exit_code = EXIT_PREFLIGHT


class InterruptedRunError(LaunchError):
    """The run was stopped with a checkpoint and can be resumed."""

    exit_code = EXIT_RESUMABLE


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a recipe."""

    key: str
    """Dotted key, as in ``optim.lr``; empty where the whole file is meant."""
    where: str
    """``FILE:LINE``, or the flag or override it came from."""
    message: str
    """What was found, what is valid, what to do."""

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"


class RecipeError(UsageError):
    """Everything that is wrong with a recipe, or a profile, at once."""

    def __init__(self, problems: Sequence[Problem], *, of: str = "recipe") -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"1 problem in the {of}" if count == 1 else f"{count} problems in the {of}"
        super().__init__("\n".join([f"{head}; nothing was started", *(f"  {p}" for p in self.problems)]))


def did_you_mean(found: str, valid: Iterable[str], *, num: int = 3) -> str:
    """``did you mean 'lr'?`` for the nearest of ``valid``, or an empty string where none is near."""
    near = difflib.get_close_matches(found, list(valid), n=num, cutoff=0.6)
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def exit_code_of(main: Callable[[], int]) -> int:
    """Run a command line's ``main`` and return its exit code, as :func:`explained` has it."""
    with explained() as ended:
        ended.code = main()
    return ended.code


@dataclass
class Ended:
    """How a command line has ended."""

    code: int = EXIT_OK
    """Its exit code."""


@contextlib.contextmanager
def explained() -> Iterator[Ended]:
    """Print what a LaunchError says instead of its traceback, and take its exit code.

    Files and folders made from here on are not writable by everybody, whatever the shell's umask is.
    """
    os.umask(os.umask(0o077) | stat.S_IWOTH)
    console.open_missing()
    ended, refused = Ended(), None
    try:
        yield ended
    except LaunchError as error:
        ended.code = error.exit_code
        _say(f"error: {redact(str(error))}")
    except KeyboardInterrupt:
        ended.code = 128 + signal.SIGINT
        _say("interrupted")
    except SystemExit as error:  # rich raises it when the reader has closed the pipe
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        ended.code = EXIT_OK
    except OSError as error:
        if console.is_protected() or not console.is_refused(error):
            raise
        ended.code = EXIT_OK
        refused = error
    finally:
        phases.end(told=False)
        console.release()
    problem = console.flush_or_drop() or refused
    if problem and not isinstance(problem, BrokenPipeError):  # `launch models | head`: the reader has seen enough
        _say(f"error: standard output: {problem.strerror}")
        ended.code = ended.code or EXIT_FAILED


def _say(text: str) -> None:
    phases.end(told=False)
    with contextlib.suppress(OSError):  # nobody is there to read it; the exit code says it too
        print(text, file=sys.stderr, flush=True)  # a job's standard error is a file, which would be buffered
