"""One SLURM cluster for all tests that ask for it: started once a session, on this machine, by slurm/dev/cluster."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import ClusterCommand

FOLDERS = Path("/tmp")  # noqa: S108 - a socket's path is short, pytest's own folders are not
CANNOT = 3


def _cannot(reason):
    """Skip; or fail, where somebody relies on these tests."""
    if os.environ.get("FTL_REQUIRE_SLURM") == "1":
        pytest.fail(f"FTL_REQUIRE_SLURM=1, and there is no SLURM cluster: {reason}", pytrace=False)
    pytest.skip(f"no SLURM cluster: {reason}")


@pytest.fixture(scope="session")
def slurm_machine():
    """A command for clusters on a machine that can have them; else skip with the reason."""
    _remove_clusters_of_dead_sessions()
    command = ClusterCommand(FOLDERS / f"finetune-launcher-tests-{os.getpid()}")
    for attempt in (("install",), ("up", "--no-accounting", "--nodes", "1")):
        tried = command.run(*attempt)
        if tried.returncode == CANNOT or (tried.returncode != 0 and attempt == ("install",)):
            _cannot(tried.stderr.strip().rpartition("\n")[2].removeprefix("cluster: "))
    command.down()
    assert tried.returncode == 0, tried.stderr
    return command


def _remove_clusters_of_dead_sessions():
    if os.geteuid() == 0:
        for folder in FOLDERS.glob("finetune-launcher-*"):
            made = re.fullmatch(r"finetune-launcher-(?:tests|faults)-([0-9]{1,7})(?:-own)?", folder.name)
            if made and not psutil.pid_exists(int(made[1])):
                ClusterCommand(folder).down()


@pytest.fixture(scope="session")
def slurm_cluster(slurm_machine):
    """The environment in which sbatch, srun and the like speak to a cluster of four nodes with accounting."""
    try:
        yield slurm_machine.up()
    finally:
        slurm_machine.down()


@pytest.fixture
def own_cluster(slurm_machine):
    """A cluster command for a test that starts and breaks a cluster of its own; down when the test ends."""
    command = ClusterCommand(slurm_machine.folder.with_name(f"{slurm_machine.folder.name}-own"))
    try:
        yield command
    finally:
        command.down()
