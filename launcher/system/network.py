"""Addresses, interfaces and ports of this machine, by which the nodes of a run find each other."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

LOWEST_PORT, HIGHEST_PORT = 10_000, 60_000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NCCL, GLOO, FAMILY = "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY"
INTERFACES = (NCCL, GLOO, FAMILY)
"""Environment variables that name the interface between the nodes; where the user has set one, it stays."""
KEPT = (*INTERFACES, "TORCH_CPP_LOG_LEVEL")
"""All variables of a plan that stay as the user has set them."""


def set_environment(variables: Mapping[str, str]) -> None:
    """Take over the environment variables of a plan."""
    known = {name: os.environ[name] for name in KEPT if name in os.environ}
    if NCCL in known:  # of which family are its addresses?
        variables = {name: value for name, value in variables.items() if name != FAMILY}
    os.environ.update({**variables, **known})


def unknown_interfaces(variables: Mapping[str, str]) -> list[str]:
    """What the user's variables name and this machine has not, each as a sentence."""
    has = {*interfaces(), *_addresses(socket.AF_INET6)}
    problems = []
    for name in (NCCL, GLOO):
        wanted = variables.get(name, "")
        if wanted and not (_nccl_finds(wanted, has) if name == NCCL else has.issuperset(wanted.split(","))):
            problems.append(f"{name}={wanted}: no such interface with an address; there are {', '.join(sorted(has))}")
    return problems


def _nccl_finds(wanted: str, has: set[str]) -> bool:
    """Whether NCCL finds an interface: ``ib,eth`` are beginnings, after ``=`` whole names, ``^`` excludes them."""
    excludes, exact = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
    names = [part.partition(":")[0] for part in wanted.lstrip("^=").split(",") if part]
    named = {one for one in has if any(one == name if exact else one.startswith(name) for name in names)}
    return bool(has - named if excludes else named)


def local_address(host: str, port: int = 1) -> str:
    """The address of this machine on the route to ``host``: that by which ``host`` reaches it."""
    info = socket.getaddrinfo(host.strip("[]"), port or 1, type=socket.SOCK_DGRAM)[0]
    with contextlib.closing(socket.socket(info[0], socket.SOCK_DGRAM)) as probe:
        probe.connect(info[4])  # sends nothing
        return str(probe.getsockname()[0])


def split(endpoint: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 address without its brackets."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def join(address: str, port: int) -> str:
    """``HOST:PORT``; an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def resolve(host: str, port: int) -> str:
    """The first address of a name, as everything that connects to it will take it.

    Raises:
        OSError: there is none.
    """
    return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])


def is_loopback(address: str) -> bool:
    """Whether a machine reaches only itself by this address."""
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def is_own(address: str) -> bool:
    """Whether this machine has an address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def interface_of(address: str) -> str | None:
    """Name of the network interface that has an ``address``, or None."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if is_loopback(str(wanted)):
        return "lo"
    family = socket.AF_INET if wanted.version == 4 else socket.AF_INET6  # noqa: PLR2004
    found = _addresses(family).items()
    return next((name for name, own in found if wanted in map(ipaddress.ip_address, own)), None)


def interface_environment(interface: str, address: str) -> dict[str, str]:
    """What tells NCCL and gloo their interface, each in its own syntax.

    NCCL's is that of its first contact, and of data where there is nothing better: InfiniBand is used all the same.

    Args:
        interface: on the route between the nodes; an alias has a label (``eth0:1``), which NCCL would take for a port.
        address: of this node there. NCCL would take the interface's first one of any family.
    """
    family = "AF_INET6" if ":" in address else "AF_INET"
    # = is exactly this one, not all that begin so
    return {NCCL: f"={interface.partition(':')[0]}", FAMILY: family, GLOO: interface}


def machine() -> str:
    """An id of this machine's network: two processes with the same id reach each other by loopback.

    Host names would not do: containers of one machine may share them.
    """
    boot = BOOT_ID.read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"


def address_of(interface: str) -> str | None:
    """The first IPv4 address of a network interface, or None."""
    return interfaces().get(interface)


def free_port(seed: int) -> int:
    """A port that nobody listens on, the same for a ``seed`` where it is free.

    It is outside the range that Linux uses for outgoing connections, which would take it now and then (enroot#243).
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


def try_port(port: int) -> None:
    """Try whether this machine can listen on a port.

    Raises:
        OSError: it cannot.
    """
    if socket.has_dualstack_ipv6():
        socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
    else:
        socket.create_server(("", port)).close()


def interfaces() -> dict[str, str]:
    """The first IPv4 address of each network interface that has one."""
    return {name: own[0] for name, own in _addresses(socket.AF_INET).items()}


def _addresses(family: socket.AddressFamily) -> dict[str, list[str]]:
    """All addresses of a family, by network interface; an interface without one is left out."""
    import psutil  # takes 0.04 s

    found = {
        name: [one.address.partition("%")[0] for one in own if one.family == family]
        for name, own in psutil.net_if_addrs().items()
    }
    return {name: own for name, own in found.items() if own}
