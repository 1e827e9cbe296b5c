"""What kind of failure an error is, and what an error file says of it."""

from __future__ import annotations

import errno
import os
import re
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.engine.device import is_out_of_memory
from launcher.engine.micro_batch import ExchangeMemoryError
from launcher.errors import LaunchError, MachineError
from launcher.system.redact import redact

SHORTAGES = (
    "shared memory",  # torch: "unable to open", "unable to allocate", and its advice after a bus error
    "Bus error",
    "Too many open files",
    "ancdata",  # Python: what came of a file that could not be opened any more
    "can't start new thread",
)
"""How torch and Python say, in a RuntimeError, that the machine or the shell's limits lack something."""
LIBRARIES = ("/gloo/", "Gloo connect", "NCCL error", "NCCL communicator", "ProcessGroupGloo", "ProcessGroupNCCL")
"""In the text of a plain RuntimeError: it comes from what the ranks speak by."""
WRONG_SETTINGS = (
    "Duplicate GPU detected",
    "ncclInvalidUsage",
    "Unable to find address for",  # gloo: an interface, or a host name, that this machine has not
    "Unable to find interface for",
    "no socket interface found",  # NCCL, and what its releases from 2.27 on say instead
    "is neither AF_INET",
    "ismatched NCCL version",
    "NCCL version mismatch",
)
"""What NCCL and gloo say of settings or installations that a restart would meet again."""
MISMATCH = "collective mismatch"
"""gloo asks whether the ranks have called different collectives: a bug, of this package or of the user's code."""
ECHOES = (
    "Connection closed by peer",  # gloo
    "Connection closed by remote peer",  # NCCL
    "Connection reset",
    "Broken pipe",
    "Connection was likely closed",  # torch's store, which an agent takes with it
    "failed to recv, got 0 bytes",  # the same, before torch 2.8
    "Pair is not connected",
    "Socket closed",
    "Socket unexpectedly closed",
    "ncclRemoteError",
    "remote process exited",
    # It waited for a rank that is gone, or hangs.
    "Watchdog caught collective operation timeout",
    "ms for recv operation to complete",
    "ms for send operation to complete",
    "Application timeout caused pair closure",
    "Read timeout",
    "Write timeout",
)
"""What NCCL, gloo and torch's store say where another rank has ended first, or the network to it."""
PACKAGE, PYTHON = Path(__file__).resolve().parents[1], Path(os.__file__).resolve().parent
LOADER_TRACEBACK = "Original Traceback"
"""How torch begins the traceback of a loader process."""
LOADER_KILLED = ("by signal: Killed", "by signal: Terminated", "exited unexpectedly")
"""How torch says that somebody else, such as the out-of-memory killer, ended a loader process. What ends one by its own
fault (an exception, a segmentation fault) would come again."""
HANDOVER = "multiprocessing/resource_sharer.py"
"""In the traceback of an error from a loader process that was ended while it handed over a batch. Torch then asks
whether it is alive, which it still is for a moment after its connections are closed."""
FRAMES = re.compile(r"\n?(Exception raised from .* \(most recent call first\):|frame #\d+: .*)")
"""Lines of C++ within torch's errors: of use to torch's authors, and in the traceback."""


def error_record(error: BaseException) -> dict[str, Any]:
    """What an error file says of an error: ``{kind, type, message, traceback, own_line}``."""
    text = redact("".join(traceback.format_exception(error)))
    return {
        "kind": error_kind(error),
        "type": type(error).__name__,
        "message": redact(_message(error)),
        "traceback": text,
        "own_line": last_own_line(text),
    }


def _message(error: BaseException) -> str:
    """What an error says; of one from a loader process, whose text holds its whole traceback, what that one says."""
    text = str(error)
    if _is_communication(error):
        return " ".join(FRAMES.sub("", text).split())
    if _is_broken_handover(error):
        return f"a loader process ended while it handed over a batch ({text or type(error).__name__})"
    if not text.startswith("Caught ") or LOADER_TRACEBACK not in text:
        return text
    said: list[str] = []
    for line in reversed(text.rstrip().splitlines()):
        if line.startswith((" ", LOADER_TRACEBACK)):
            break
        said.insert(0, line)
    return " ".join(said).removeprefix(f"{type(error).__name__}: ")


def error_kind(error: BaseException) -> str:
    """What kind of failure an error is.

    ``usage`` (the user can repair it), ``peer_lost`` (another rank died first), ``network`` (what the ranks speak by:
    NCCL, gloo, torch's store), ``lost_worker`` (a loader process was killed from outside), ``out_of_memory``,
    ``memory_kill`` (the same in an exchange: only a new attempt can take smaller batches), ``full_disk``,
    ``environment`` (the machine's, the shell's, a file system's) or ``bug``.
    """
    if isinstance(error, LaunchError):
        return "environment" if isinstance(error, MachineError) else "usage"
    if is_out_of_memory(error):
        in_collective = isinstance(error, ExchangeMemoryError | dist.DistError)
        return "memory_kill" if in_collective else "out_of_memory"
    if _is_broken_handover(error):
        return "lost_worker"
    if kind := _environment_kind(error):
        return kind
    text = str(error)
    if text.startswith("DataLoader worker") and any(sign in text for sign in LOADER_KILLED):
        return "lost_worker"
    return _network_kind(error) if _is_communication(error) else "bug"


def _is_broken_handover(error: BaseException) -> bool:
    """Whether a loader process ended while it handed over a batch."""
    if not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        return False
    return any(frame.filename.endswith(HANDOVER) for frame in traceback.extract_tb(error.__traceback__))


def _is_communication(error: BaseException) -> bool:
    """Whether an error comes from what the ranks speak by; those of gloo, and some of NCCL, are plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(name in str(error) for name in LIBRARIES)


def _network_kind(error: BaseException) -> str:
    """Whether it is wrong settings, an echo of another rank's end, or a cause of its own."""
    text = str(error)
    if any(sign in text for sign in WRONG_SETTINGS):
        return "environment"
    if any(sign in text for sign in ECHOES):
        return "peer_lost"
    return "bug" if MISMATCH in text else "network"


def _environment_kind(error: BaseException) -> str | None:
    """``environment`` or ``full_disk`` where an error is the machine's, the shell's or a file system's."""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError) and error.errno is not None:
        return "full_disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "environment"
    short = isinstance(error, RuntimeError) and any(sign in str(error) for sign in SHORTAGES)
    return "environment" if short else None


def last_own_line(text: str) -> str | None:
    """``FILE:LINE`` of the last line of the user's own code in a traceback, a loader process's within it too.

    Theirs is what belongs neither to this package nor to Python, and is not installed.
    """
    found = [f"{file}:{line}" for file, line in re.findall(r'^ *File "([^"]+)", line (\d+)', text, re.MULTILINE)]
    return next((place for place in reversed(found) if _is_users(place.rpartition(":")[0])), None)


def _is_users(file: str) -> bool:
    path = Path(file).resolve()
    ours = any(path.is_relative_to(folder) for folder in (PACKAGE, PACKAGE.parent / "tools", PYTHON))
    return not (ours or file.startswith("<") or {"site-packages", "dist-packages"} & set(path.parts))
