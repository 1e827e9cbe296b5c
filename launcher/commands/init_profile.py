"""``launch init-profile``: asks the SLURM cluster what it has, and writes a profile for it with comments."""

from __future__ import annotations

import contextlib
import getpass
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.backends.slurm import admission
from launcher.backends.slurm import client as slurm_client
from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError
from launcher.plan import profile as profiles
from launcher.recipe.keys import show
from launcher.system.words import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.backends.slurm.admission import Cluster, Node

USUAL_MIN = 240
"""Minutes that a job asks for where it may: short jobs start sooner, and a run is queued again at its limit."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A key of the profile."""

    key: str
    """Its name."""
    value: Any
    """Chosen."""
    why: str
    """A comment: what there is to choose from."""


def main(argv: Sequence[str]) -> int:
    """Run ``launch init-profile``; return its exit code."""
    parser = parser_of("init-profile", "Ask this SLURM cluster what it has, and write a profile for it.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="of the profile (default: the cluster's name)")
    name = parser.parse_args(argv).name
    try:
        cluster = admission.read_cluster()
        name = name or _cluster_name()
    except slurm_client.SlurmError as error:
        raise UsageError(f"{error}; run this where jobs are submitted, on a login node") from None
    file = profiles.user_folder() / f"{name}.yaml"
    if not NAME.fullmatch(name):
        raise UsageError(f"{name}: no name for a profile; valid: letters, digits, dot, dash and underscore")
    if file.exists():
        raise UsageError(f"{file}: is there already, and stays as it is; give another NAME, or remove it")
    text = write(name, list(rows(cluster, _accounts())))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {error.strerror}") from None
    print(f"{text}\nwritten to {file}; change what does not fit\nnext: launch RECIPE --profile {name} --dry-run")
    return EXIT_OK


def rows(cluster: Cluster, accounts: dict[str, list[str]]) -> Iterator[Row]:
    """What the profile says, from what the cluster has and what this user may.

    Args:
        cluster: its partitions and nodes.
        accounts: of the user, each with the qualities of service allowed; empty where there is no accounting.
    """
    name = _partition(cluster)
    yield Row(key="partition", value=name, why=f"there are {'; '.join(_described(cluster))}")
    first = next(iter(accounts), None) if len(accounts) == 1 else None
    one_of = f"yours: {', '.join(accounts)}" if accounts else "whom the job is charged to; this cluster names none"
    yield Row(key="account", value=first, why=one_of + ("" if len(accounts) < 2 else "; null: your default"))  # noqa: PLR2004
    allowed = list(dict.fromkeys(qos for several in accounts.values() for qos in several))
    yield Row(key="qos", value=None, why=f"allowed: {', '.join(allowed) or 'none is named'}; null: your default")
    limit = admission.minutes(cluster.partitions[name]["MaxTime"])
    why = "minutes; the run saves before, is queued again and goes on"
    yield Row(
        key="timeout_min",
        value=min(limit or USUAL_MIN, USUAL_MIN),
        why=f"{why}; {name} allows {limit if limit is not None else 'any number'}",
    )
    nodes = [node for node in cluster.nodes if node.partition == name]
    yield _cores(nodes)
    kinds = sorted({item.partition("(")[0].rpartition(":")[0] for node in nodes for item in node.gres.split(",")})
    kinds = [kind for kind in kinds if kind.startswith("gpu:")]
    more = f"; kinds here: {', '.join(kinds)}" if kinds else ""
    yield Row(key="gres", value=None, why=f"null: GPUs are asked for by --gpus-per-node{more}")
    features = sorted({feature for node in nodes for feature in node.features} - {"(null)", ""})
    yield Row(key="constraint", value=None, why=f"features of its nodes: {', '.join(features) or 'none'}")
    memory = f"its nodes give out {min((n.mem_mb for n in nodes), default=0) // 1024} GB or more"
    yield Row(key="mem_gb", value=None, why=f"per node; null: the cluster's default; {memory}")
    yield Row(key="interface", value=None, why="network of the workers, as ib0; null: that of the route between nodes")
    yield Row(key="setup", value=[], why="lines of shell before all else: [module load cuda, source venv/bin/activate]")


def _partition(cluster: Cluster) -> str:
    """The default partition, or the first one that has GPUs where the default has none."""
    names = sorted(cluster.partitions, key=lambda name: cluster.partitions[name].get("Default") != "YES")
    if not names:
        raise UsageError("this cluster shows you no partition (sinfo); ask its administrators")
    up = [name for name in names if cluster.partitions[name].get("State", "UP") == "UP"] or names
    return next((name for name in up if _gpus(cluster, name)), up[0])


def _gpus(cluster: Cluster, partition: str) -> int:
    return max((node.num_gpus(None) for node in cluster.nodes if node.partition == partition), default=0)


def _described(cluster: Cluster) -> Iterator[str]:
    for name, fields in cluster.partitions.items():
        nodes = [node for node in cluster.nodes if node.partition == name]
        gpus = _gpus(cluster, name)
        facts = [plural(len(nodes), "node"), f"{plural(gpus, 'GPU')} each" if gpus else "no GPUs"]
        facts += ["the default"] if fields.get("Default") == "YES" else []
        yield f"{name} ({', '.join(facts)})"


def _cores(nodes: Sequence[Node]) -> Row:
    """CPU cores of each worker: those of a node, shared by its GPUs."""
    with_gpus = [node for node in nodes if node.num_gpus(None)]
    if with_gpus:
        cores = min(node.cpus // node.num_gpus(None) for node in with_gpus)
        return Row(key="cpus_per_gpu", value=max(1, cores), why="CPU cores of each worker: a node's, by its GPUs")
    fewest = min((node.cpus for node in nodes), default=1)
    why = f"CPU cores of each worker (launch.procs of them a node); its nodes have {fewest} or more"
    return Row(key="cpus_per_gpu", value=max(1, min(fewest, 8)), why=why)


def _cluster_name() -> str:
    found = re.search(r"^ClusterName\s*= (\S+)", slurm_client.run("scontrol", "show", "config"), re.MULTILINE)
    return found[1] if found else "mycluster"


def _accounts() -> dict[str, list[str]]:
    """The user's accounts, each with the qualities of service allowed; nothing where there is no accounting."""
    with contextlib.suppress(slurm_client.SlurmError, KeyError, OSError):
        command = ("show", "associations", f"user={getpass.getuser()}", "format=Account,QOS")
        found: dict[str, list[str]] = {}
        for line in slurm_client.run("sacctmgr", "--noheader", "--parsable2", *command).splitlines():
            account, _, qos = line.partition("|")
            found.setdefault(account, []).extend(filter(None, qos.split(",")))
        return found
    return {}


def write(name: str, found: Sequence[Row]) -> str:
    """The profile file: each key below the comment that says what there is to choose from."""
    head = [
        f"# Profile of the cluster {name}, from what sinfo, scontrol and sacctmgr said (launch init-profile).",
        "# Every other key with its default: slurm/profiles/template.yaml, docs/slurm.md",
    ]
    lines = [line for row in found for line in (f"# {row.why}", f"{row.key}: {show(row.value)}")]
    return "\n".join([*head, *lines]) + "\n"
