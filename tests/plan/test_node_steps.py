"""A job whose nodes' supervisors survive each other: its script in bash, with SLURM's commands replaced.

What SLURM itself does with such a job: tests/slurm/test_elastic.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from launcher.plan import batch_script, node_steps
from launcher.plan.profile import Profile

SRUN = """\
for word; do [ "$last" != --node ] || node=$word; [ "$last" != --start ] || start=$word; last=$word; done
echo "$node $*" >> {folder}/sruns
n=$(grep -c "^$node " {folder}/sruns)
trap 'echo "$node USR2" >> {folder}/told' USR2
source {folder}/supervisor
"""
"""The supervisor is a piece of shell that knows its ``$node`` and which of its starts, ``$n``, this is."""


class Job:
    """The real script of a job of two nodes or three; what the supervisors do is given."""

    def __init__(self, folder):
        self.folder = folder
        self.run = folder / "my [run]"
        for name in ("logs", "slurm"):
            (self.run / name).mkdir(parents=True)
        (self.run / "logs" / "slurm-7.log").touch()
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.job = batch_script.Job(
            name="a", run_dir=str(self.run), nodes=3, is_elastic=True, procs_per_node=2, device="cpu", python="python"
        )
        self.env = {"PATH": f"{self.bin}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}
        self.env["SLURM_JOB_NODELIST"] = "n[1-3]"

    def prepare(self, supervisor, holds="n1 n2 n3", state="RUNNING"):
        (self.folder / "supervisor").write_text(supervisor)
        (self.folder / "calls").touch()
        (self.folder / "sruns").touch()
        show = f"case $3 in 'n[1-3]') printf 'n1\\nn2\\nn3\\n' ;; *) printf '%s\\n' {holds} ;; esac"
        for name, body in {
            "srun": SRUN.format(folder=self.folder),
            "squeue": f'[ "$5" = %T ] && echo {state} || echo now',
            "scontrol": f"""case "$1 $2" in
                'show hostnames') {show} ;;
                'show job') echo 'JobId=7 ExcNodeList=n9 X=1' ;;
                *) echo "$@" >> {self.folder}/calls ;;
                esac""",
            "sbatch": "true",
            "sleep": "exec /usr/bin/sleep 0.05",
        }.items():
            (self.bin / name).write_text(f"#!/bin/bash\n{body}\n")
            (self.bin / name).chmod(0o755)

    def end(self, supervisor, **changes):
        """The script's exit code, and what it had SLURM do."""
        self.prepare(supervisor, **changes)
        text = batch_script.build_script(self.job, Profile())
        done = subprocess.run(["bash", "-c", text], env=self.env, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.returncode, (self.folder / "calls").read_text().splitlines()

    def starts(self):
        return [int(line.split()[0]) for line in (self.folder / "sruns").read_text().splitlines()]

    def lost(self):
        lines = (self.run / "events.jsonl").read_text().splitlines() if (self.run / "events.jsonl").exists() else []
        found = [json.loads(line) for line in lines]
        return [(event["node"], event["host"]) for event in found if event["kind"] == "supervisor_lost"]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


LEAVES = 'leave() { echo $1 > "$run/slurm/left-$start-$node"; exit $1; }\nrun=$(dirname "$(dirname "$0")")/"my [run]"\n'
SPEAKS = 'speak() { echo $1 > "$run/slurm/done-$start-0001"; leave $1; }\n'
BEGIN = LEAVES + SPEAKS + """echo '{"kind": "attempt_started"}' >> "$run/events.jsonl"\n"""


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_node_that_speaks_for_the_run_says_how_the_job_ends(code, job):
    found, calls = job.end(BEGIN + f"[ $node = 1 ] && speak {code} || leave 3")
    assert found == code
    assert calls == (["requeue 7", "update JobId=7 ExcNodeList=n9"] if code == 75 else [])
    assert sorted(job.starts()) == [0, 1, 2]


def waits(num):
    """Until the supervisor of node 2 has been started so often."""
    return f'until [ $(grep -c "^2 " "$(dirname "$0")/../sruns") = {num} ]; do sleep; done; sleep; sleep\n'


def test_a_supervisor_that_is_killed_is_started_again_and_the_others_go_on(job):
    dies = "[ $node = 2 ] && [ $n -lt 4 ] && exit 137\n"
    assert job.end(f"{BEGIN}{dies}{waits(4)}[ $node = 1 ] && speak 0 || leave 0") == (0, [])
    assert sorted(job.starts()) == [0, 1, 2, 2, 2, 2]
    assert job.lost() == [(2, "n3")] * 3


def test_a_node_that_keeps_dying_is_left_out_and_does_not_hold_up_the_end(job):
    dies = "[ $node = 2 ] && exit 137\n"
    code, calls = job.end(f"{BEGIN}{dies}{waits(node_steps.MAX_DEATHS)}[ $node = 1 ] && speak 75 || leave 75")
    assert (code, calls) == (75, ["requeue 7", "update JobId=7 ExcNodeList=n9,n3"])
    assert job.starts().count(2) == node_steps.MAX_DEATHS


def test_what_cannot_even_start_is_tried_a_few_times(job):
    assert job.end(f"{BEGIN}exit 127") == (127, ["requeue 7", "update JobId=7 ExcNodeList=n9"])
    assert job.starts().count(0) == 4


def test_a_node_that_slurm_has_taken_out_of_the_job_is_not_tried_again(job):
    assert job.end(f"{BEGIN}[ $node = 2 ] && exit 1\nsleep\n[ $node = 1 ] && speak 0 || leave 0", holds="n1 n2")[0] == 0
    assert sorted(job.starts()) == [0, 1, 2]


def test_nobody_is_started_again_when_the_run_is_over_or_the_job_is_cancelled(job):
    assert job.end(f"{BEGIN}[ $node = 1 ] && speak 0\nsleep; sleep; sleep; exit 137")[0] == 0
    assert job.lost() == []


def test_nobody_is_started_again_in_a_job_that_was_cancelled(job):
    assert job.end(f"{BEGIN}exit 137", state="CANCELLED") == (137, [])
    assert sorted(job.starts()) == [0, 1, 2]


def test_where_nobody_speaks_the_job_is_queued_again(job):
    job.env["SLURM_RESTART_COUNT"] = "1"
    assert job.end(f"{BEGIN}[ $node = 0 ] && leave 75 || exit 137", holds="n1")[0] in (75, 137)
    assert (job.folder / "calls").read_text().splitlines()[0] == "requeue 7"


def test_a_node_that_hangs_after_the_end_of_the_run_has_its_step_ended(job, monkeypatch):
    monkeypatch.setattr(node_steps, "LINGER_S", 1)
    start = time.monotonic()
    assert job.end(f"{BEGIN}[ $node = 1 ] && speak 0\n[ $node = 2 ] || leave 0\nexec /usr/bin/sleep 600")[0] == 0
    assert time.monotonic() - start < 300


def test_in_an_allocation_a_stop_reaches_the_step_of_every_node(job):
    job.prepare(f"{BEGIN}until grep -q . $(dirname $0)/../told; do sleep; done 2> /dev/null; sleep; speak 75")
    command = batch_script.step_command(job.job, Profile())
    assert command[:2] == ("bash", "-c")
    with subprocess.Popen(command, env=job.env, start_new_session=True) as process:
        while len(job.starts()) < 3:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGUSR2)
        assert process.wait(timeout=60) == 75
    assert sorted((job.folder / "told").read_text().split()) == ["0", "1", "2", "USR2", "USR2", "USR2"]
