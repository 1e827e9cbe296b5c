"""A real cluster on this machine, as tests start, break and stop it."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

CLUSTER = Path(__file__).parents[2] / "slurm" / "dev" / "cluster"


def _environment(folder):
    """The user's environment, less what speaks of another cluster."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SINFO_"))}
    return inherited | {"FTL_CLUSTER_DIR": str(folder)}


class ClusterCommand:
    """``slurm/dev/cluster`` on a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = _environment(folder)

    def run(self, *arguments):
        """Run it to its end, whatever that is."""
        return subprocess.run(
            [CLUSTER, *arguments], check=False, capture_output=True, text=True, env=self.environment, timeout=600
        )

    def start(self, *arguments):
        """Start it, and return while it runs."""
        return subprocess.Popen(
            [CLUSTER, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self.environment
        )

    def up(self, *arguments):
        """Bring it up, and return the environment of its users."""
        done = self.run("up", *arguments)
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        name, value = line.removeprefix("export ").split("=", 1)
        return self.environment | {name: shlex.split(value)[0]}

    def down(self):
        """Take it down, however much of it there is."""
        done = self.run("down")
        assert done.returncode == 0, done.stderr

    def slurm(self, *command):
        """Standard output of one of SLURM's commands; the cluster is up."""
        environment = self.environment | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=200)
        return done.stdout
