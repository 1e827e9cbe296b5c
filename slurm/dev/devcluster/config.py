"""The files that SLURM reads, as text from a layout."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .layout import Layout

NUM_GPUS = 8
"""Pretended GPUs of a node."""

# Pretended too (SlurmdParameters=config_overrides), so that a machine of two CPUs runs a job of eight.
_NODE = f"CPUs=16 RealMemory=64000 Gres=gpu:{NUM_GPUS} State=UNKNOWN"

_SLURM = """\
ClusterName=ftl
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
# A requeued job waits until its old credentials have expired: with the default it would be two minutes.
AuthInfo=socket={munge},cred_expire=10
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/pid/slurmctld.pid
SlurmdPidFile={root}/pid/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log

SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
# A node that was cut is down after this many seconds, not after five minutes.
SlurmdTimeout=15
# A third of the default: what a task gets between SIGTERM and SIGKILL where it has not saved long ago.
KillWait=10

SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=2000
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{accounting}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=15 MaxTime=1-00:00:00 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=REQUEUE MaxTime=1-00:00:00 State=UP
"""

_SLURM_ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={head}
# AuthInfo does not count for slurmdbd: without this line its clients ask the machine's own munge.
AccountingStoragePass={munge}
AccountingStorageTRES=gres/gpu
"""

_DATABASE = """\
AuthInfo=socket={munge}
DbdHost=head
DbdAddr={head}
SlurmUser=root
PidFile={root}/pid/slurmdbd.pid
LogFile={root}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""


def write_files(layout: Layout) -> None:
    """Write every file the daemons and the clients read, and make the folders they write into."""
    root = layout.root
    for name in ("log", "pid", "state", "munge", "gpus", "database", *(f"spool/{node}" for node in layout.nodes)):
        (root / name).mkdir(parents=True, exist_ok=True)
    values = {"root": root, "head": layout.head_address, "munge": layout.munge_socket}
    address_by_host = {name: address for address, name in layout.hosts_by_address.items()}
    nodes = [f"NodeName={n} NodeAddr={address_by_host[n]} NodeHostname={n} {_NODE}" for n in layout.nodes]
    accounting = _SLURM_ACCOUNTING.format(**values) if layout.accounting else ""
    layout.slurm_conf.write_text(_SLURM.format(**values, nodes="\n".join(nodes), accounting=accounting))
    _write_secret(root / "slurmdbd.conf", _DATABASE.format(**values).encode())
    _write_secret(root / "munge.key", secrets.token_bytes(128))
    for number in range(NUM_GPUS):
        # A device, for SLURM gives no number to a plain file and then sets no CUDA_VISIBLE_DEVICES. Nobody opens it.
        (root / "gpus" / f"nvidia{number}").symlink_to(os.devnull)
    (root / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={root}/gpus/nvidia[0-{NUM_GPUS - 1}]\n")
    hosts = ["127.0.0.1 localhost", "::1 localhost", *(" ".join(pair) for pair in layout.hosts_by_address.items())]
    layout.hosts.write_text("\n".join(hosts) + "\n")


def _write_secret(path: Path, content: bytes) -> None:
    """Write a file that only root ever could read."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(content)
