"""Addresses, interfaces and ports of this machine, as the nodes of a run need them to find each other."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

LOWEST_PORT, HIGHEST_PORT = 10_000, 60_000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_SIOCGIFADDR = 0x8915
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
"""Environment variables that name the interface between the nodes; where the user has set one, it stays."""


def set_environment(variables: Mapping[str, str]) -> None:
    """Take over the environment variables of a plan."""
    known = {name: os.environ[name] for name in INTERFACES if name in os.environ}
    os.environ.update({**variables, **known})


def local_address(host: str, port: int = 1) -> str:
    """The address of this machine on the route to ``host``: that by which ``host`` reaches it."""
    info = socket.getaddrinfo(host.strip("[]"), port or 1, type=socket.SOCK_DGRAM)[0]
    with contextlib.closing(socket.socket(info[0], socket.SOCK_DGRAM)) as probe:
        probe.connect(info[4])  # sends nothing
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Name of the network interface that has an IPv4 ``address``, or None."""
    return next((name for name, found in _interfaces().items() if found == address), None)


def address_of(interface: str) -> str | None:
    """The IPv4 address of a network interface, or None."""
    return _interfaces().get(interface)


def free_port(seed: int) -> int:
    """A port that nobody listens on, the same for a ``seed`` where it is free.

    Outside the range from which Linux gives ports to outgoing connections: one of those would be in the way now and
    then (enroot#243).
    """
    low, high = (int(part) for part in EPHEMERAL.read_text(encoding="ascii").split())
    ports = [port for port in range(LOWEST_PORT, HIGHEST_PORT) if not low <= port <= high]
    ports = ports or list(range(LOWEST_PORT, HIGHEST_PORT))  # the range was widened to everything
    start = seed % len(ports)
    for port in ports[start:] + ports[:start]:
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("no free port")


def _interfaces() -> dict[str, str]:
    found = {}
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                found[name] = socket.inet_ntoa(reply[20:24])
    return found
