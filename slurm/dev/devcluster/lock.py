"""A lock that the kernel frees when its holder ends, for any reason."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

from .layout import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator

_POLL_S = 0.1


@contextlib.contextmanager
def only_one(name: str, *, patience_s: float) -> Iterator[None]:
    """Keep every other process that asks for ``name`` on this machine waiting.

    Raises:
        ClusterError: It was another's all the time.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        give_up = time.monotonic() + patience_s
        while True:
            try:
                lock.bind(f"\0finetune-launcher-cluster-{name}")
                break
            except OSError:
                if time.monotonic() > give_up:
                    raise ClusterError(f"another `cluster` command has been at work for {patience_s:g} s") from None
            time.sleep(_POLL_S)
        yield
