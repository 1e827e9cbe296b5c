"""Ports that a test names before somebody listens there."""

from __future__ import annotations

import contextlib
import os
import socket

PORTS = range(2000, 6000)
"""Below those that the launcher takes by itself (launcher.system.network), and that Linux takes."""


def free() -> int:
    """One on which nobody listens, and which no other test on this machine is given while this process lives."""
    start = os.getpid() % len(PORTS)
    for port in (*PORTS[start:], *PORTS[:start]):
        mark = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError), socket.socket() as probe:
            mark.bind(f"\0finetune-launcher-tests-port-{port}")  # no file: it goes with this process
            probe.bind(("", port))
            mark.detach()  # it stays open
            return port
        mark.close()
    raise OSError("no free port")
