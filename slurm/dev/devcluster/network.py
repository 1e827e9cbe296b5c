"""One network namespace a node, all on one bridge, and what runs in them.

The bridge and the controller have a namespace of their own, ``head``. So the machine's firewall does not filter what
the nodes say to each other, none of the cluster's ports can be taken on the machine, and everything the cluster runs
is found by the namespace it runs in, whoever started it and whatever became of its parent.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .layout import ClusterError

if TYPE_CHECKING:
    from .layout import Layout

DAEMON_MARK = "FTL_CLUSTER_DAEMON"
"""Environment variable of every daemon, with the cluster's folder: finds one whose namespace was taken away."""

NAMESPACES = Path("/run/netns")
"""The folder of names of `ip netns`, which makes it, and a mount on it, at its first use. It stays: another program may
be about to use it."""

# RFC 2544 sets these aside for the testing of network devices: no cluster and no home network has them.
_ADDRESSES = ipaddress.IPv4Network("198.18.0.0/16")


def free_network(layout: Layout) -> str:
    """First three parts of a /24 that nothing on this machine routes to.

    Raises:
        ClusterError: All are taken.
    """
    taken = [ipaddress.IPv4Network(route["dst"]) for route in _ip_json("-4", "route") if route["dst"] != "default"]
    candidates = list(_ADDRESSES.subnets(new_prefix=24))
    start = int(layout.tag, 16) % len(candidates)  # two clusters that come up at once do not try the same one first
    for candidate in candidates[start:] + candidates[:start]:
        if not any(candidate.overlaps(other) for other in taken):
            return str(candidate).rpartition(".")[0]
    raise ClusterError(f"this machine routes all of {_ADDRESSES} elsewhere")


def create(layout: Layout) -> None:
    """Make the namespaces, the bridge and the links, up and with their addresses."""
    head = layout.namespace("head")
    _ip("netns", "add", head)
    _ip("-n", head, "link", "set", "lo", "up")
    _ip("-n", head, "link", "add", "br0", "type", "bridge")
    _ip("-n", head, "address", "add", f"{layout.head_address}/24", "dev", "br0")
    _ip("-n", head, "link", "set", "br0", "up")
    _ip("link", "add", layout.login_link, "type", "veth", "peer", "name", "login", "netns", head)
    _ip("address", "add", f"{layout.login_address}/24", "dev", layout.login_link)
    _ip("link", "set", layout.login_link, "up")
    _ip("-n", head, "link", "set", "login", "master", "br0", "up")
    for address, node in layout.hosts_by_address.items():
        if node in layout.nodes:
            namespace = layout.namespace(node)
            _ip("netns", "add", namespace)
            _ip("-n", head, "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", head, "link", "set", node, "master", "br0", "up")


def remove(layout: Layout) -> None:
    """Take away every link and namespace of this cluster, however many there still are."""
    if Path("/sys/class/net", layout.login_link).exists():
        _ip("link", "delete", layout.login_link)
    for name in _namespaces(layout):
        _ip("netns", "delete", name)


def set_link(layout: Layout, node: str, state: str) -> None:
    """Set a node's link ``up`` or ``down`` at the bridge, as a switch would: the node keeps its address and routes."""
    _ip("-n", layout.namespace("head"), "link", "set", node, state)


def is_cut(layout: Layout, node: str) -> bool:
    """Whether :func:`set_link` left the node's link down."""
    (link,) = _ip_json("-n", layout.namespace("head"), "link", "show", "dev", node)
    return "UP" not in link["flags"]


def processes(layout: Layout) -> dict[int, tuple[str, str]]:
    """All living processes of the cluster, daemons and jobs: pid to (``head`` or node, name of the program)."""
    host_by_namespace = {_identity(NAMESPACES / name): name.rpartition("-")[2] for name in _namespaces(layout)}
    mark = f"{DAEMON_MARK}={layout.root}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or is a zombie, which is no process to us
                host = host_by_namespace.get(_identity(entry / "ns/net"))
                if host is None and mark in (entry / "environ").read_bytes().split(b"\0"):
                    host = "nowhere"
                if host is not None:
                    found[int(entry.name)] = (host, (entry / "comm").read_text().strip())
    found.pop(os.getpid(), None)
    return found


def kill_processes(layout: Layout, *, timeout_s: float = 60) -> None:
    """Kill the processes that :func:`processes` finds, until there are none.

    Raises:
        ClusterError: Something did not die.
    """
    give_up = time.monotonic() + timeout_s
    while left := processes(layout):
        if time.monotonic() > give_up:
            raise ClusterError(f"cannot kill {', '.join(f'{name} ({pid})' for pid, (_, name) in left.items())}")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _namespaces(layout: Layout) -> list[str]:
    return sorted(path.name for path in NAMESPACES.glob(layout.namespace("*")))


def _identity(namespace: Path) -> tuple[int, int]:
    status = namespace.stat()
    return status.st_dev, status.st_ino


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise ClusterError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _ip_json(*arguments: str) -> list[dict[str, str]]:
    return list(json.loads(_ip("-json", *arguments) or "[]"))
