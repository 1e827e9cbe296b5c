"""A process that serves: it listens, loads, answers, and stops so that no request is lost."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

import uvicorn

from launcher.errors import UsageError
from launcher.system.cores import num_cores
from launcher.system.processes import heeded
from launcher.tools.serving.service import Service

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator

    from launcher.tools.serving.settings import Settings

BACKLOG = 2048
"""Connections that may wait to be taken."""
KEEP_ALIVE_S = 75
"""An idle connection is kept so long: longer than balancers do, which would else use one as it is closed."""
LINGER_S, LINGER_MOST_S = 0.2, 3.0
"""After the last connection was taken its request may take so long to come; the latter where one waits for its first:
on a busy machine, or from far away."""
SO_ATTACH_FILTER, DROP = 26, struct.pack("HBBI", 0x06, 0, 0, 0)  # linux/filter.h; "return 0"
CURES = {
    errno.EADDRINUSE: "another program listens there: choose another one with --port (0: any that is free)",
    errno.EACCES: "ports below 1024 need rights: choose another one with --port",
    errno.EADDRNOTAVAIL: "--host takes an address of this machine: 127.0.0.1 for programs on it, 0.0.0.0 for all",
}
"""What to do, by the error."""


def listen(settings: Settings) -> socket.socket:
    """A socket at the settings' address.

    Raises:
        UsageError: it cannot be had; says what to do.
    """
    place = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        cure = CURES.get(error.errno or 0, CURES[errno.EADDRNOTAVAIL])
        raise UsageError(f"{place}: {error.strerror or error}; {cure}") from None
    found.set_inheritable(True)
    return found


def address(listening: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def take_no_more(listening: socket.socket) -> None:
    """Have the kernel make no more connections to a socket, for all processes that share it, and for good.

    Those that are made already can still be taken.

    Who tries to connect tries again a second later, and is refused by then. Where that cannot be had, nothing changes.
    """
    program = ctypes.create_string_buffer(DROP)
    with contextlib.suppress(OSError):
        listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))


def serve(
    settings: Settings, listening: socket.socket, tell: Callable[[], None], all_stop: Callable[[], bool] | None = None
) -> None:
    """Serve until a signal says to stop; every request that was begun is answered.

    Args:
        settings: of the server.
        listening: the socket.
        tell: is called once the model is loaded and has computed.
        all_stop: this is one of several processes, whose parent says when to end at once: whether all of them stop.

    Raises:
        UsageError: there is no such model.
    """
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # requests that are no HTTP are answered with 400
    service = Service(settings, max(1, num_cores() // settings.workers))
    asyncio.run(_serve(service, settings, listening, tell, all_stop))


async def _serve(
    service: Service,
    settings: Settings,
    listening: socket.socket,
    tell: Callable[[], None],
    all_stop: Callable[[], bool] | None,
) -> None:
    config = uvicorn.Config(
        service,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = _Server(config, service, listening, settings.drain_s, all_stop)

    async def work() -> None:
        try:
            await asyncio.to_thread(service.load)
            tell()
            await service.run()
        finally:
            server.should_exit = True

    working = asyncio.create_task(work())
    await server.serve(sockets=[listening])
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working


class _Server(uvicorn.Server):
    """uvicorn, but told to stop it first answers what has come and what is on its way."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        listening: socket.socket,
        drain_s: float,
        all_stop: Callable[[], bool] | None,
    ) -> None:
        super().__init__(config)
        self._service = service
        self._listening = listening
        self._drain_s = drain_s
        self._all_stop = all_stop
        self._stopping: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at the signals that this process heeds; uvicorn's own would end it by the signal, not with 0."""
        loop, numbers = asyncio.get_running_loop(), heeded()
        for number in numbers:
            loop.add_signal_handler(number, self._told, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _told(self, number: signal.Signals) -> None:
        if not self._stopping:
            self._stopping = asyncio.create_task(self._stop())
        elif not self._all_stop:
            print("a second signal: requests that are under way are dropped", file=sys.stderr, flush=True)
            os._exit(128 + number)

    async def _stop(self) -> None:
        self._service.is_stopping = True
        await asyncio.sleep(self._drain_s)
        await self._close()
        await asyncio.sleep(LINGER_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_MOST_S):
                while any(  # noqa: ASYNC110  uvicorn tells nobody of it
                    getattr(one, "cycle", self) is None for one in self.server_state.connections
                ):
                    await asyncio.sleep(LINGER_S / 4)
        await self._service.is_idle.wait()
        self.should_exit = True

    async def _close(self) -> None:
        """Take no more connections.

        Those that have been made, and wait to be taken, are left to other processes at the socket; where all of them
        stop they would be cut off, and are taken first.
        """
        waiting = []
        if not self._all_stop or self._all_stop():
            take_no_more(self._listening)  # else one could be made after the last look, and be cut off
            with contextlib.suppress(OSError):  # there is none any more, or this process does not listen yet
                while True:
                    waiting.append(self._listening.accept()[0])
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for connection in waiting:
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        """As uvicorn makes it for a new connection."""
        kind: Any = self.config.http_protocol_class
        made: asyncio.Protocol = kind(config=self.config, server_state=self.server_state, app_state={})
        return made
