"""Start the daemons of a cluster, each on its host, and wait until they serve."""

from __future__ import annotations

import socket
import subprocess
import time
from typing import TYPE_CHECKING

from .layout import PATH, ClusterError, Layout
from .network import DAEMON_MARK

if TYPE_CHECKING:
    from collections.abc import Callable

_DATABASE_PORT = 6819

PRIVATE = ("--uts", "--mount", "--propagation", "slave")
"""Options of `unshare` for a host: a name and mounts of its own. The machine's later mounts reach it."""

# Not `ip netns exec`: it mounts /sys anew, and slurmd then finds no cgroup file system and ends.
_ON_HOST = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'

# In memory: the hundreds of fdatasync of a new database take seconds on a busy disk. The mount ends with the daemon.
_DATABASE = """set -e
mount -t tmpfs -o mode=700 tmpfs "$0"
set -- --user=root --datadir="$0/data" --innodb-log-file-size=8M --innodb-buffer-pool-size=32M "$@"
mariadb-install-db --no-defaults --auth-root-authentication-method=normal "$@"
exec mariadbd --no-defaults --skip-networking "$@"
"""


def expected(layout: Layout) -> set[tuple[str, str]]:
    """(host, program) of every daemon of a cluster that is up."""
    head = {"munged", "slurmctld"} | ({"mariadbd", "slurmdbd"} if layout.accounting else set())
    return {("head", program) for program in head} | {(node, "slurmd") for node in layout.nodes}


class Daemons:
    """The daemons that this process has started."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start_all(self) -> None:
        """Start everything, and return when jobs can be submitted.

        Raises:
            ClusterError: A daemon ended or did not come up in time; the message ends with the last lines of its log.
        """
        layout = self._layout
        munge = layout.munge_socket.parent
        self._start(
            "munged",
            "head",
            *("munged", "--foreground", f"--key-file={layout.root}/munge.key", f"--socket={layout.munge_socket}"),
            *(f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"),
        )
        if layout.accounting:
            self._start_accounting()
        self._wait("munged", layout.munge_socket.exists)
        self._start("slurmctld", "head", "slurmctld", "-D", "-i")
        self._wait("slurmctld", lambda: ask(layout, "scontrol", "ping") is not None)
        for node in layout.nodes:
            self._start(f"slurmd-{node}", node, "slurmd", "-D", "-N", node)
        self._wait("slurmctld", lambda: set(node_states(layout).values()) == {"idle"})
        if layout.accounting:
            self._wait("slurmdbd", lambda: ask(layout, "sacct", "--noheader") is not None)

    def _start_accounting(self) -> None:
        database = self._layout.root / "database"
        options = (f"--socket={self._layout.database_socket}", f"--pid-file={database}/pid")
        self._start("mariadbd", "head", "sh", "-c", _DATABASE, str(database), *options)
        self._wait("mariadbd", self._layout.database_socket.exists)
        self._start("slurmdbd", "head", "slurmdbd", "-D")
        self._wait("slurmdbd", lambda: self._listens(_DATABASE_PORT))

    def _start(self, name: str, host: str, *command: str) -> None:
        """Start a daemon in the foreground, so that its messages go to its output as well as to its log."""
        layout = self._layout
        namespace = ("nsenter", f"--net=/run/netns/{layout.namespace(host)}")
        with layout.output(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [*namespace, "unshare", *PRIVATE, "sh", "-c", _ON_HOST, host, str(layout.hosts), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=layout.root,
                env=_environment(layout),
            )

    def _wait(self, name: str, ready: Callable[[], bool], *, timeout_s: float = 240) -> None:
        """Wait for ``ready``; whatever was started must be alive meanwhile."""
        give_up = time.monotonic() + timeout_s
        while not ready():
            dead = [daemon for daemon, process in self._running.items() if process.poll() is not None]
            if dead or time.monotonic() > give_up:
                culprit = dead[0] if dead else name
                problem = "has ended" if dead else f"is not ready after {timeout_s:.0f} s"
                lines = self._layout.output(culprit).read_text(errors="replace").splitlines()[-15:]
                raise ClusterError("\n  ".join([f"{culprit} {problem}; the end of what it said:", *lines]))
            time.sleep(0.05)

    def _listens(self, port: int) -> bool:
        try:
            socket.create_connection((self._layout.head_address, port), timeout=1).close()
        except OSError:
            return False
        return True


def node_states(layout: Layout) -> dict[str, str]:
    """The state of each node (``idle``, ``down*``) by the controller; empty if it does not answer."""
    answer = ask(layout, "sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %t")
    return dict(line.split() for line in (answer or "").splitlines())


def ask(layout: Layout, *command: str) -> str | None:
    """Run one of SLURM's own programs against this cluster; None where it failed."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=_environment(layout))
    return done.stdout if done.returncode == 0 else None


def _environment(layout: Layout) -> dict[str, str]:
    """The whole environment of a daemon: nothing of the user's shell, whose SLURM_* could speak of another cluster."""
    return {
        "PATH": PATH,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "SLURM_CONF": str(layout.slurm_conf),
        "MYSQL_UNIX_PORT": str(layout.database_socket),
        DAEMON_MARK: str(layout.root),
    }
