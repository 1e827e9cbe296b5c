"""What the tests' own process does with signals, which runs inherit from it."""

from __future__ import annotations

import signal


def heed() -> None:
    """Heed what a shell or nohup may have had this process ignore: runs keep ignoring it, and tests send it."""
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
