"""The programs a cluster is made of, and the distribution's packages they come from."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from .layout import CannotError, ClusterError, say
from .lock import only_one

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS = {
    "ip": "iproute2",
    "munged": "munge",
    "sbatch": "slurm-wlm",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
}
"""Program to the package that has it."""

ACCOUNTING_PROGRAMS = {
    "slurmdbd": "slurmdbd",
    # The core package has the server and no service: nothing to keep from starting, no database in /var/lib.
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",  # mariadb-install-db calls it
}

_LOCK_PATIENCE_S = 600
"""Two test processes ask for the packages at once, and dpkg would refuse the second."""

_SERVICES = ("munge", "slurmctld", "slurmd", "slurmdbd")
"""Packages with a service of the same name, which their installation would start now and at every boot."""

_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_SAVED = Path("/usr/sbin/policy-rc.d.before-finetune-launcher")
_POLICY_TEXT = "#!/bin/sh\n# slurm/dev/cluster install: start no service; gone when the installation ends\nexit 101\n"


def missing(*, accounting: bool) -> list[str]:
    """The packages whose programs are not on this machine."""
    wanted = PROGRAMS | (ACCOUNTING_PROGRAMS if accounting else {})
    return sorted({package for program, package in wanted.items() if shutil.which(program) is None})


def install(*, accounting: bool) -> None:
    """Install what is missing, and leave its services stopped and disabled.

    Nothing that is there is upgraded or removed: a MySQL or SLURM that the machine has stays, and where it stands in
    the way, apt's refusal is the answer.

    Raises:
        CannotError: Not root, or not a Debian or Ubuntu.
        ClusterError: apt-get failed; it has said why.
    """
    with only_one("installation", patience_s=_LOCK_PATIENCE_S):
        if os.geteuid() == 0:
            _restore_policy()
        if wanted := missing(accounting=accounting):
            _install(wanted)
        else:
            say("all packages are there")
        if still := missing(accounting=accounting):
            raise ClusterError(f"installed, but the programs of {' '.join(still)} are not on PATH")


def _install(wanted: list[str]) -> None:
    if os.geteuid() != 0:
        raise CannotError(f"installing {' '.join(wanted)} needs root")
    if shutil.which("apt-get") is None:
        raise CannotError(f"{' '.join(wanted)} missing, and there is no apt-get: only Debian and Ubuntu are supported")
    say(f"installing {' '.join(wanted)}")
    absent = [service for service in _SERVICES if not _is_installed(service)]
    with _no_service_starts():
        if not _apt_get("update", "-q"):
            say("apt-get update failed; trying with the lists that are here")
        if not _apt_get("install", "-q", "-y", "--no-install-recommends", "--no-upgrade", "--no-remove", *wanted):
            raise ClusterError(f"apt-get could not install {' '.join(wanted)}; its own words are above")
    for service in absent:
        if _is_installed(service) and shutil.which("systemctl"):
            subprocess.run(["systemctl", "--quiet", "disable", service], check=False, stdout=2)


def _is_installed(package: str) -> bool:
    query = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Status}", package], check=False, capture_output=True, text=True
    )
    return query.stdout.endswith(" installed")


def _apt_get(*arguments: str) -> bool:
    """Run apt-get without a question, its output on stderr (stdout is what the user evaluates)."""
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1"}
    command = ["apt-get", "-o", f"DPkg::Lock::Timeout={_LOCK_PATIENCE_S}", *arguments]
    return subprocess.run(command, check=False, stdout=2, stdin=subprocess.DEVNULL, env=env).returncode == 0


@contextlib.contextmanager
def _no_service_starts() -> Iterator[None]:
    """Deny every start of a service by Debian's own means, and put back what was there."""
    if _POLICY.exists():
        _POLICY.rename(_POLICY_SAVED)
    try:
        _POLICY.write_text(_POLICY_TEXT)
        _POLICY.chmod(0o755)
        yield
    finally:
        _restore_policy()


def _restore_policy() -> None:
    """Undo :func:`_no_service_starts`, this one's or that of an installation that was killed."""
    if _POLICY.exists() and _POLICY.read_text() == _POLICY_TEXT:
        _POLICY.unlink()
    if _POLICY_SAVED.exists():
        _POLICY_SAVED.rename(_POLICY)
