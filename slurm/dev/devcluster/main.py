"""The command line of ``cluster``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

from . import config, daemons, network, packages
from .layout import MAX_NODES, PATH, CannotError, ClusterError, Layout, say
from .lock import only_one

EXIT_OK, EXIT_FAILED, EXIT_CANNOT = 0, 1, 3
_LOCK_PATIENCE_S = 120

_TRIAL = "ip link add br0 type bridge; ip link add one type veth peer name two; mount --bind /etc/hosts /etc/hosts"
"""Commands that try everything that a cluster needs of the kernel, in namespaces that end with the trial."""


def main() -> int:
    """Run the command line; return 0, 1 where something failed (or nothing is up), 3 where it cannot be had here."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # an `up` cleans up behind itself
    os.environ["PATH"] = PATH
    os.umask(0o022)  # munged serves no socket in a folder that others cannot reach
    arguments = _parser().parse_args()
    try:
        if arguments.command == "install":
            packages.install(accounting=not arguments.no_accounting)
            return EXIT_OK
        _check_root(arguments.command)
        layout = Layout.from_environment()
        with only_one(layout.tag, patience_s=_LOCK_PATIENCE_S):
            return _run(arguments, layout.as_saved())
    except CannotError as error:
        say(f"cannot: {error}")
        return EXIT_CANNOT
    except ClusterError as error:
        say(f"error: {error}")
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cluster", description="A real SLURM cluster on this one Linux machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    no_accounting = argparse.ArgumentParser(add_help=False)
    no_accounting.add_argument("--no-accounting", action="store_true", help="no slurmdbd and no database: no sacct")
    up = commands.add_parser("up", parents=[no_accounting], help="start it, print the export line to evaluate")
    up.add_argument("--nodes", type=int, default=4, choices=range(1, MAX_NODES + 1), metavar="N", help="nodes (4)")
    commands.add_parser("down", help="stop it and remove all that it left")
    commands.add_parser("status", help="what runs and in which state the nodes are; exit 1 where it is not up")
    commands.add_parser("install", parents=[no_accounting], help="install the packages (Debian, Ubuntu)")
    for name, effect in (("cut", "take a node's network away"), ("heal", "give it back")):
        commands.add_parser(name, help=effect).add_argument("node", help="as in n2")
    return parser


def _run(arguments: argparse.Namespace, layout: Layout) -> int:
    if arguments.command == "up":
        _up(layout, num_nodes=arguments.nodes, accounting=not arguments.no_accounting)
    elif arguments.command == "down":
        _take_down(layout)
        say("down")
    elif arguments.command == "status":
        return _status(layout)
    else:
        if not _is_up(layout):
            raise ClusterError("it is not up")
        if arguments.node not in layout.nodes:
            raise ClusterError(f"no node {arguments.node}: there are {' '.join(layout.nodes)}")
        network.set_link(layout, arguments.node, "down" if arguments.command == "cut" else "up")
        if arguments.command == "heal":
            _report(layout, arguments.node)
    return EXIT_OK


def _up(layout: Layout, *, num_nodes: int, accounting: bool) -> None:
    """Start the cluster unless it is up, and print the line for the shell."""
    wanted = dataclasses.replace(layout, num_nodes=num_nodes, accounting=accounting)
    if not _is_up(layout):
        _check_machine(wanted)
        _start(wanted)
    elif wanted != layout:
        raise ClusterError(f"it is up already, {_kind(layout)}; `cluster down` first")
    print(f"export SLURM_CONF={shlex.quote(str(layout.slurm_conf))}")


def _start(layout: Layout) -> None:
    begin = time.monotonic()
    _take_down(layout)  # what a crash left
    layout.root.mkdir()
    try:
        with only_one("network", patience_s=_LOCK_PATIENCE_S):  # two that come up at once must not choose the same
            layout = dataclasses.replace(layout, network=network.free_network(layout))
            layout.save()
            network.create(layout)
        config.write_files(layout)
        daemons.Daemons(layout).start_all()
    except BaseException:
        _take_down(layout)
        raise
    say(f"up after {time.monotonic() - begin:.1f} s, {_kind(layout)}")


def _take_down(layout: Layout) -> None:
    """Remove the processes, the network and the folder; each may be there or not, and a second try finds the rest."""
    network.kill_processes(layout)
    network.remove(layout)
    if layout.root.exists():
        for path in layout.root.iterdir():
            if path != layout.saved:  # the mark goes last: without it the folder would not count as a cluster's
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(layout.root)


def _report(layout: Layout, node: str) -> None:
    """Make a node report to the controller, which asks a node that is down only about once a minute."""
    for pid, found in network.processes(layout).items():
        if found == (node, "slurmd"):
            os.kill(pid, signal.SIGHUP)


def _status(layout: Layout) -> int:
    if not _is_up(layout):
        left = layout.root.exists() or network.processes(layout)
        say("not up, but something is left of it: `cluster down`" if left else "not up")
        return EXIT_FAILED
    states = daemons.node_states(layout)
    print(f"up, {_kind(layout)}, in {layout.root}")
    for node in layout.nodes:
        print(f"  {node}  {states.get(node, 'unknown')}{'  cut' if network.is_cut(layout, node) else ''}")
    for pid, (host, program) in sorted(network.processes(layout).items()):
        print(f"  {host:4}  {program} ({pid})")
    print(f"export SLURM_CONF={shlex.quote(str(layout.slurm_conf))}")
    return EXIT_OK


def _is_up(layout: Layout) -> bool:
    return bool(layout.network) and daemons.expected(layout) <= set(network.processes(layout).values())


def _kind(layout: Layout) -> str:
    return f"{layout.num_nodes} nodes, {'with' if layout.accounting else 'without'} accounting"


def _check_root(command: str) -> None:
    if os.geteuid() != 0:
        raise CannotError(f"`cluster {command}` needs root, to make network namespaces")


def _check_machine(layout: Layout) -> None:
    """Raise CannotError where this machine cannot have a cluster, before anything is made."""
    if absent := packages.missing(accounting=layout.accounting):
        raise CannotError(f"{' '.join(absent)} not installed; `cluster install` does it on Debian and Ubuntu")
    trial = subprocess.run(
        ["unshare", *daemons.PRIVATE, "--net", "sh", "-ec", _TRIAL], check=False, capture_output=True
    )
    if trial.returncode != 0:
        raise CannotError(
            "root may not make namespaces, links and mounts here (in a container: start it with --privileged); "
            f"trying it said: {trial.stderr.decode().strip()}"
        )
    if os.statvfs(layout.root.parent).f_flag & os.ST_NOEXEC:
        raise CannotError(
            f"{layout.root.parent} is mounted noexec, and SLURM runs scripts from there; "
            "set FTL_CLUSTER_DIR to a folder elsewhere"
        )
