"""The cluster that the other tests of this folder run on is what it says, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from devcluster.layout import Layout

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]  # clusters come up late on a busy machine

# One task listens, the other finds it by its node's name; both then reach the machine they were submitted from.
MEET = """
import os, socket, sys, time
if os.environ["SLURM_PROCID"] == "0":
    socket.create_server(("0.0.0.0", 24680)).accept()
else:
    for attempt in range(1000):
        try:
            socket.create_connection(("n1", 24680), timeout=5)
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
socket.create_connection((os.environ["SLURM_SUBMIT_HOST"], int(sys.argv[1])), timeout=5)
print(os.environ["SLURM_PROCID"], socket.gethostname())
"""

# SLURM warns the steps of a job and not its script, and kills what is still there when GraceTime is over.
PREEMPTED = """\
#!/bin/bash
if [ -n "$SLURM_RESTART_COUNT" ]; then echo "again after $(cat high.txt)"; exit; fi
srun --ntasks=1 --nodes=1 bash -c '
    trap "echo warned; trap - TERM" TERM
    echo ready
    for second in {1..200}; do sleep 1 & wait; done'
"""


def run(environment, *command, folder="/tmp"):  # noqa: S108
    """What a program prints that must succeed."""
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, cwd=folder, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


INSTALL = """
import pathlib, sys, time
from devcluster import packages
there, log = map(pathlib.Path, sys.argv[1:])
def apt_get(*arguments):
    with log.open("a") as stream: stream.write(f"{arguments[0]} ")
    time.sleep(0.5)  # another process that installs now would be refused by dpkg
    there.touch()
    return True
packages.missing = lambda accounting: [] if there.exists() else ["slurm-wlm"]
packages._apt_get = apt_get
packages.install(accounting=True)
"""


def test_of_two_processes_that_install_at_once_one_waits_for_the_other(tmp_path):
    command = [sys.executable, "-c", INSTALL, str(tmp_path / "there"), str(tmp_path / "log")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT / "slurm/dev") for _ in range(2)]
    said = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (tmp_path / "log").read_text() == "update install "
    assert sorted("all packages are there" in text for text in said) == [False, True]


def wait_until(condition, *, timeout_s=400):
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.2)


def states(environment):
    lines = run(environment, "sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %t").splitlines()
    return dict(line.split() for line in lines)


def ended(environment, job):
    return not run(environment, "squeue", "--noheader", "--jobs", job)


def daemons(command):
    """{(host, program): pid} as `status` says."""
    found = re.findall(r"^  (\w+) +(\w+) \((\d+)\)$", command.run("status").stdout, re.MULTILINE)
    return {(host, program): int(pid) for host, program, pid in found}


def traces(command):
    """Whatever of a cluster is on this machine: folder, mounts, links, namespaces, processes."""
    tag = Layout(root=command.folder).tag
    found = [str(command.folder)] if command.folder.exists() else []
    found += [
        line
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if tag in line or str(command.folder) in line
    ]
    found += [str(path) for folder in ("/sys/class/net", "/run/netns") for path in Path(folder).glob(f"*{tag}*")]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            said = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if f"{command.folder}/".encode() in said:
                found.append(said.decode(errors="replace"))
    return found


def is_alive(pid):
    with contextlib.suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_four_nodes_are_idle_and_have_eight_gpus(slurm_cluster):
    nodes = run(slurm_cluster, "sinfo", "--noheader", "--Node", "--format=%N %t %G %P").splitlines()
    assert sorted(line.split() for line in nodes) == [
        [node, "idle", "gpu:8", partition] for node in ("n1", "n2", "n3", "n4") for partition in ("high", "low*")
    ]


def test_tasks_run_on_hosts_with_names_of_their_own(slurm_cluster):
    names = run(slurm_cluster, "srun", "--nodes=2", "--nodelist=n1,n2", "hostname").split()
    assert sorted(names) == ["n1", "n2"]
    assert run(slurm_cluster, "hostname").strip() == os.uname().nodename


def test_gpus_are_counted_and_numbered(slurm_cluster):
    show = ("sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert run(slurm_cluster, "srun", "--gpus-per-node=8", *show) == "0,1,2,3,4,5,6,7\n"
    nine = subprocess.run(["srun", "--gpus-per-node=9", *show], check=False, capture_output=True, env=slurm_cluster)
    assert nine.returncode != 0
    assert b"Requested node configuration is not available" in nine.stderr


def test_nodes_reach_each_other_and_the_machine(slurm_cluster, tmp_path):
    (tmp_path / "meet.py").write_text(MEET)
    with socket.create_server(("0.0.0.0", 0)) as machine:  # noqa: S104 - the nodes' network is one of its interfaces
        command = (
            "srun",
            "--nodes=2",
            "--nodelist=n1,n2",
            "/usr/bin/python3",
            "meet.py",
            str(machine.getsockname()[1]),
        )
        met = run(slurm_cluster, *command, folder=tmp_path)
    assert sorted(met.splitlines()) == ["0 n1", "1 n2"]


def test_a_batch_job_writes_into_the_folder_it_was_submitted_from_and_sacct_knows_it(slurm_cluster, tmp_path):
    submit = ("sbatch", "--parsable", "--wait", "--nodes=2", "--wrap=srun hostname > names.txt; exit 3")
    done = subprocess.run(submit, check=False, capture_output=True, text=True, env=slurm_cluster, cwd=tmp_path)
    assert done.returncode == 3
    assert len((tmp_path / "names.txt").read_text().split()) == 2
    account = ("sacct", "--noheader", "--parsable2", "--allocations", "--format=State,ExitCode", "--jobs", done.stdout)
    wait_until(lambda: run(slurm_cluster, *account).strip() == "FAILED|3:0")


def test_a_job_in_high_preempts_and_requeues_one_in_low(slurm_cluster, tmp_path):
    (tmp_path / "low.sh").write_text(PREEMPTED)
    output = tmp_path / "low.txt"
    submit = ("sbatch", "--nodes=4", "--exclusive", "--parsable")
    low = run(slurm_cluster, *submit, f"--output={output}", "--open-mode=append", "low.sh", folder=tmp_path).strip()
    wait_until(lambda: output.exists() and "ready" in output.read_text())
    run(slurm_cluster, *submit, "--partition=high", "--wrap=echo high > high.txt", folder=tmp_path)
    wait_until(lambda: "warned" in output.read_text())
    assert run(slurm_cluster, "squeue", "--noheader", "--format=%T", f"--jobs={low}") == "RUNNING\n"  # GraceTime
    wait_until(lambda: "again" in output.read_text())
    said = [line for line in output.read_text().splitlines() if line.split()[0] in {"ready", "warned", "again"}]
    assert said == ["ready", "warned", "again after high"]
    wait_until(lambda: ended(slurm_cluster, low))
    assert re.search(
        r"JobState=COMPLETED .* Restarts=1 ", run(slurm_cluster, "scontrol", "show", "job", low), re.DOTALL
    )


def test_a_cut_node_is_unreachable_until_it_is_healed(slurm_machine, slurm_cluster):
    knock = (
        "srun",
        "--nodelist=n3",
        "/usr/bin/python3",
        "-c",
        "import socket; socket.create_connection(('n4', 6818), 5)",
    )
    run(slurm_cluster, *knock)
    assert slurm_machine.run("cut", "n4").returncode == 0
    try:
        refused = subprocess.run(knock, check=False, capture_output=True, env=slurm_cluster)
        assert refused.returncode != 0
        assert b"timed out" in refused.stderr or b"No route to host" in refused.stderr
        assert "n4" in slurm_machine.run("status").stdout
        assert re.search(r"n4 .* cut$", slurm_machine.run("status").stdout, re.MULTILINE)
        wait_until(lambda: states(slurm_cluster) == {"n1": "idle", "n2": "idle", "n3": "idle", "n4": "down*"})
    finally:
        assert slurm_machine.run("heal", "n4").returncode == 0
    wait_until(lambda: states(slurm_cluster)["n4"] == "idle")
    run(slurm_cluster, *knock)
    assert run(slurm_cluster, "srun", "--nodelist=n4", "hostname") == "n4\n"


def test_a_node_that_is_not_there_cannot_be_cut(slurm_machine, slurm_cluster):
    done = slurm_machine.run("cut", "n5")
    assert done.returncode == 1
    assert "n1 n2 n3 n4" in done.stderr


def test_up_a_second_time_changes_nothing(slurm_machine, slurm_cluster):
    before = daemons(slurm_machine)
    assert slurm_machine.up() == slurm_cluster
    assert slurm_machine.run("up", "--no-accounting").returncode == 1
    assert daemons(slurm_machine) == before


def test_without_accounting_jobs_run_beside_another_cluster(slurm_cluster, own_cluster, tmp_path):
    environment = own_cluster.up("--no-accounting", "--nodes", "2")
    assert set(daemons(own_cluster)) == {
        *(("head", program) for program in ("munged", "slurmctld", "slurmscriptd")),
        *((node, "slurmd") for node in ("n1", "n2")),
    }
    job = run(
        environment, "sbatch", "--parsable", "--nodes=2", "--wrap=srun hostname > names.txt", folder=tmp_path
    ).strip()
    wait_until(lambda: ended(environment, job))
    assert sorted((tmp_path / "names.txt").read_text().split()) == ["n1", "n2"]
    assert subprocess.run(["sacct"], check=False, capture_output=True, env=environment).returncode != 0
    assert len(states(slurm_cluster)) == 4


def test_down_leaves_nothing_behind(own_cluster, tmp_path):
    environment = own_cluster.up("--nodes", "2")
    pids = tmp_path / "pids"
    script = f"setsid sleep 1000 & echo $! >> {pids}; sleep 1000 & echo $! >> {pids}; wait"
    run(environment, "sbatch", "--nodes=2", f"--wrap=srun sh -c '{script}'", folder=tmp_path)
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 4)
    everything = [*daemons(own_cluster).values(), *map(int, pids.read_text().split())]
    assert all(map(is_alive, everything))
    assert len(traces(own_cluster)) > 10
    own_cluster.down()
    assert not traces(own_cluster)
    assert not any(map(is_alive, everything))
    own_cluster.down()


def test_up_after_everything_was_killed(own_cluster):
    own_cluster.up("--nodes", "2")
    before = daemons(own_cluster)
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, before.values())))
    assert own_cluster.run("status").returncode == 1
    environment = own_cluster.up("--nodes", "2")
    assert set(daemons(own_cluster)) == set(before)
    assert run(environment, "srun", "hostname") == "n1\n"


@pytest.mark.parametrize("half_way", ["cluster.json", "slurm.conf", "log/mariadbd.out", "log/slurmd-n1.log"])
def test_up_after_an_up_that_was_killed(own_cluster, half_way):
    with own_cluster.start("up", "--nodes", "2") as first:
        try:
            wait_until((own_cluster.folder / half_way).exists)
        finally:
            first.kill()
    environment = own_cluster.up("--nodes", "2")
    assert sorted(run(environment, "srun", "--nodes=2", "hostname").split()) == ["n1", "n2"]
    own_cluster.down()
    assert not traces(own_cluster)


def test_an_up_that_is_interrupted_cleans_up(own_cluster):
    with own_cluster.start("up") as first:
        try:
            wait_until((own_cluster.folder / "log" / "slurmctld.log").exists)
        finally:
            first.terminate()
    assert first.returncode == 128 + signal.SIGTERM
    assert not traces(own_cluster)


def test_a_folder_with_other_files_is_refused_and_kept(own_cluster):
    precious = own_cluster.folder / "precious"
    own_cluster.folder.mkdir()
    precious.write_text("mine")
    for command in ("up", "down"):
        done = own_cluster.run(command)
        assert done.returncode == 1
        assert "holds other files" in done.stderr
    assert precious.read_text() == "mine"
    precious.unlink()
    own_cluster.folder.rmdir()
