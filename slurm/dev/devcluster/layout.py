"""A cluster's folder on the machine, and the names and addresses that follow from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

DEFAULT_DIR = "/tmp/finetune-launcher-cluster"  # noqa: S108 - not /run: that is often noexec, and spool holds scripts
MAX_NODES = 32
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH for programs: the user's own may lack the sbin folders, or have another SLURM in it."""

_MAX_SOCKET_PATH = 107  # sun_path of unix(7), less its final NUL


class ClusterError(Exception):
    """The cluster or the request is wrong (exit 1)."""


class CannotError(ClusterError):
    """This machine cannot have a cluster; nothing was started (exit 3)."""


def say(message: str) -> None:
    """Tell the user; stdout is kept for what the shell evaluates."""
    print(f"cluster: {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One cluster's folder, names and addresses."""

    root: Path
    """Folder of everything the cluster writes."""
    num_nodes: int = 4
    """Compute nodes, named n1 and up."""
    accounting: bool = True
    """Whether slurmdbd and a database run."""
    network: str = ""
    """First three parts of the addresses, as in ``198.18.7``; empty until the network is there."""

    @classmethod
    def from_environment(cls) -> Layout:
        """Return the layout of a new cluster at FTL_CLUSTER_DIR.

        Raises:
            ClusterError: The path is too long for that of a socket.
        """
        root = Path(os.path.abspath(os.environ.get("FTL_CLUSTER_DIR") or DEFAULT_DIR))  # noqa: PTH100 - keeps links
        layout = cls(root=root)
        if len(str(layout.munge_socket)) > _MAX_SOCKET_PATH:
            raise ClusterError(f"FTL_CLUSTER_DIR={root} is too long for the path of a socket; choose a shorter one")
        return layout

    def as_saved(self) -> Layout:
        """Return the layout of the cluster that is in the folder; this one where there is none.

        Raises:
            ClusterError: The folder holds anything but a cluster of ours; ``down`` would remove it.
        """
        root = self.root
        if not root.parent.is_dir():
            raise ClusterError(f"FTL_CLUSTER_DIR={root}: {root.parent} is not there; make it first")
        if root.is_symlink() or (root.exists() and (not root.is_dir() or root.stat().st_uid != 0)):
            raise ClusterError(
                f"{root} is not a folder of root's own; remove it or set FTL_CLUSTER_DIR to another place"
            )
        if root.exists() and any(root.iterdir()) and not any(root.glob(f"{self.saved.name}*")):
            raise ClusterError(
                f"{root} holds other files; set FTL_CLUSTER_DIR to a folder that is empty or not there yet"
            )
        return dataclasses.replace(self, **json.loads(self.saved.read_text())) if self.saved.exists() else self

    def save(self) -> None:
        """Mark the folder as a cluster's, and store what does not follow from the folder."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "root"}
        beside = self.saved.with_name(f"{self.saved.name}.part")
        beside.write_text(json.dumps(fields))
        beside.replace(self.saved)

    @property
    def tag(self) -> str:
        """A part of names that differs from that of a cluster in another folder."""
        return hashlib.sha256(str(self.root).encode()).hexdigest()[:6]

    @property
    def saved(self) -> Path:
        """The file that marks a folder as a cluster's."""
        return self.root / "cluster.json"

    @property
    def slurm_conf(self) -> Path:
        """The value of SLURM_CONF."""
        return self.root / "slurm.conf"

    @property
    def hosts(self) -> Path:
        """The hosts file of all nodes."""
        return self.root / "hosts"

    @property
    def munge_socket(self) -> Path:
        """Where the cluster's own munge listens."""
        return self.root / "munge" / "munge.socket"

    @property
    def database_socket(self) -> Path:
        """Where the cluster's own database listens, and nowhere else."""
        return self.root / "database.socket"

    @property
    def nodes(self) -> list[str]:
        """Names of the compute nodes."""
        return [f"n{number}" for number in range(1, self.num_nodes + 1)]

    @property
    def hosts_by_address(self) -> dict[str, str]:
        """Address to name of all that is on the network: the head, the nodes and this machine."""
        nodes = {f"{self.network}.{10 + number}": name for number, name in enumerate(self.nodes, start=1)}
        return {self.head_address: "head"} | nodes | {self.login_address: os.uname().nodename}

    @property
    def head_address(self) -> str:
        """Address of slurmctld and slurmdbd."""
        return f"{self.network}.1"

    @property
    def login_address(self) -> str:
        """Address of this machine, where users submit."""
        return f"{self.network}.254"

    @property
    def login_link(self) -> str:
        """Name of this machine's one new network interface."""
        return f"ftl-{self.tag}"

    def namespace(self, host: str) -> str:
        """Name of the network namespace of a node, or of ``head``."""
        return f"ftl-{self.tag}-{host}"

    def output(self, daemon: str) -> Path:
        """Output of a daemon, as in ``slurmd-n1``; the log beside it has the same lines with times."""
        return self.root / "log" / f"{daemon}.out"
