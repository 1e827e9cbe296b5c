"""Whole scripts are held by tests/golden (tests/test_plan.py); here is what no golden file can say."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.profile import Profile
from launcher.sbatch import Job, build_script

LINES = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029"), max_size=30)


def script(job=None, **profile):
    values = {"name": "a", "run_dir": "/runs/a", "nodes": 2, "procs_per_node": 4, "device": "cuda", "python": "python"}
    return build_script(Job(**values | (job or {})), Profile(**profile))


def directives(text):
    return dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH ")
    )


@given(value=LINES, path=LINES.map(lambda text: "/" + text.replace("/", "")))
def test_no_value_is_ever_a_command(value, path):
    text = script(
        {"run_dir": path, "python": f"{path}/python"}, account=value, sbatch={"comment": value}, env={"A": value}
    )
    assert shlex.split(directives(text)["account"]) == [value]
    assert shlex.split(directives(text)["comment"]) == [value]
    assert f"export A={shlex.quote(value)}" in text.splitlines()
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@given(value=LINES, name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{,20}", fullmatch=True), path=LINES)
def test_every_value_reaches_its_command_as_one_word(value, name, path):
    """What bash itself makes of the lines that hold values, with a srun that only writes down its words."""
    folder = "/p" + path.replace("/", "")
    job = {"name": name, "run_dir": folder, "python": f"{folder}/python"}
    text = script(job, constraint=value, env={"A": value}, srun_args=[f"--container-image={value}"])
    (called,) = [line for line in text.splitlines() if line.startswith("srun ")]
    exports = [line for line in text.splitlines() if line.startswith(("export A=", "run="))]
    code = "\n".join(["srun() { printf '%s\\0' \"$@\"; }", *exports, called, 'printf \'%s\\0\' "$A" "$run"'])
    done = subprocess.run(["bash", "-c", code], capture_output=True, check=True)
    *words, seen, run = done.stdout.decode().split("\0")[:-1]
    assert (seen, run) == (value, folder)
    assert f"--container-image={value}" in words
    assert words[-5:] == [f"{folder}/python", "-u", "-m", "submitit.core._submit", f"{folder}/slurm"]
    assert shlex.split(directives(text)["job-name"]) == [name]
    assert shlex.split(directives(text)["constraint"]) == [value]
    assert shlex.split(directives(text)["output"]) == [f"{folder}/logs/slurm-%j.log"]


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ({}, {"gpus-per-node": "4", "cpus-per-task": "32", "time": "240", "signal": "USR2@120", "nodes": "2"}),
        ({"gres": "gpu:a100"}, {"gres": "gpu:a100:4"}),
        ({"cpus_per_gpu": 3, "mem_gb": 1.5}, {"cpus-per-task": "12", "mem": "1536M"}),
        (
            {"exclusive": True, "reservation": "r", "mail_user": "a@b"},
            {"exclusive": "", "reservation": "r", "mail-user": "a@b"},
        ),
        (
            {"sbatch": {"licenses": "x:1", "contiguous": True, "requeue": False}},
            {"licenses": "x:1", "contiguous": "", "requeue": ""},
        ),
    ],
)
def test_what_a_profile_says_is_asked_for(profile, expected):
    assert expected.items() <= directives(script(**profile)).items()


def test_one_task_a_node_sees_all_its_gpus():
    found = directives(script())
    assert found["ntasks-per-node"] == "1"
    assert "gpus-per-task" not in found
    assert not {"gres", "gpus-per-node"} & directives(script({"device": "cpu"})).keys()


@pytest.mark.parametrize(
    ("code", "state", "log", "calls"),
    [
        ((143, 1), "RUNNING", "", []),
        ((143, 0), "RUNNING", "", []),
        ((143, 75, "n3,n4"), "RUNNING", "", ["requeue 7", "update JobId=7 ExcNodeList=n9,n3,n4"]),
        ((143, 75), "RUNNING", "", ["requeue 7", "update JobId=7 ExcNodeList=n9"]),
        (0, "RUNNING", "", []),
        (1, "RUNNING", "", []),
        (2, "RUNNING", "", []),
        (3, "RUNNING", "", []),
        (75, "CANCELLED", "", []),
        (75, "RUNNING", "", ["requeue 7", "update JobId=7 ExcNodeList=n9"]),
        (
            75,
            "RUNNING",
            "srun: error: n1: task 0: Exited with exit code 75\n",
            ["requeue 7", "update JobId=7 ExcNodeList=n9"],
        ),
        (
            137,
            "RUNNING",
            "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Killed\n",
            ["requeue 7", "update JobId=7 ExcNodeList=n9,n2"],
        ),
    ],
)
def test_what_the_script_does_when_the_run_has_ended(code, state, log, calls, tmp_path):
    """The real script in bash, with SLURM's commands replaced by ones that write down how they were called."""
    run = tmp_path / "my run"
    (run / "logs").mkdir(parents=True)
    (run / "slurm").mkdir()
    if isinstance(code, tuple):  # srun's, and what the first node has said
        (run / "slurm" / "done-7-0-0").write_text(f"{code[1]}\n")
        (run / "slurm" / "bad-7-0-0").write_text("".join(code[2:]))
        srun, code = code[:2]
    else:
        srun = code
    (run / "logs" / "slurm-7.log").write_text("srun: error: n5: task 1: Killed\n")  # of an earlier start
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, body in {
        "srun": f"printf '{log}' >> '{run}/logs/slurm-7.log'; exit {srun}",
        "squeue": f"echo {state}",
        "scontrol": f'[ "$1" = show ] && echo "JobId=7 A=(null) ExcNodeList=n9 X=1" || echo "$@" >> "{tmp_path}/calls"',
    }.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_ / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script({"run_dir": str(run)})],
        env={"PATH": f"{bin_}:/usr/bin:/bin", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert done.stderr == ""
    made = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert made == calls
    assert (run / "events.jsonl").exists() == (code == 137)
