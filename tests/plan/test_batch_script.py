"""Whole scripts are held by tests/golden (tests/plan/test_plan.py); here is what no golden file can say."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan import batch_script
from launcher.plan.batch_script import build_script
from launcher.plan.batch_shell import MAX_STARTS
from launcher.plan.profile import Profile

LINES = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029"), max_size=30)


def script(job=None, **profile):
    values = {"name": "a", "run_dir": "/runs/a", "nodes": 2, "procs_per_node": 4, "device": "cuda", "python": "python"}
    return build_script(batch_script.Job(**values | (job or {})), Profile(**profile))


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
            {"sbatch": {"licenses": "x:1", "contiguous": True, "spread-job": False}},
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


@pytest.mark.parametrize(("gres", "asked"), [(None, "--gpus-per-node=4"), ("gpu:a100", "--gres=gpu:a100:4")])
def test_a_step_asks_for_gpus_as_a_job_does(gres, asked):
    job = batch_script.Job(name="a", run_dir="/a", nodes=2, procs_per_node=4, device="cuda", python="python")
    command = batch_script.step_command(job, Profile(gres=gres))
    assert [word for word in command if word.startswith(("--gpus", "--gres"))] == [asked]


REQUEUED = ["requeue 7", "update JobId=7 ExcNodeList=n9"]
LEFT = "srun: error: n2: task 1: Exited with exit code {}\nsrun: error: n1: task 0: Killed\n".format


class Job:
    """The real script in bash, with SLURM's commands replaced by ones that write down how they were called."""

    def __init__(self, folder):
        self.folder = folder
        self.run = folder / "my run"
        for name in ("logs", "slurm"):
            (self.run / name).mkdir(parents=True)
        (self.run / "logs" / "slurm-7.log").write_text("srun: error: n5: task 1: Killed\n")  # of an earlier start
        self.event("launched")

    def event(self, kind):
        with (self.run / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": 1.0, "kind": kind}) + "\n")

    def events(self, kind):
        lines = (self.run / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def says(self, **words):
        for name, text in words.items():
            (self.run / "slurm" / f"{name}-7-0-0-{len(text)}").write_text(f"{text}\n")

    def start(
        self,
        srun,
        log="",
        *,
        state="echo RUNNING",
        requeue="true",
        nodes=2,
        fits="true",
        begins=True,
        element=None,
        **profile,
    ):
        """Run the script; srun ends with a code and some words. What it had SLURM do is in calls."""
        bin_ = self.folder / "bin"
        bin_.mkdir(exist_ok=True)
        start = f"echo '{json.dumps({'kind': 'attempt_started'})}' >> '{self.run}/events.jsonl'" if begins else "true"
        self.calls = self.folder / "calls"
        self.calls.write_text("")
        show = 'echo "JobId=7 A=(null) ExcNodeList=n9 X=1"'
        for name, body in {
            "srun": f"printf '{log}' >> '{self.run}/logs/slurm-7.log'; {start}; exit {srun}",
            "squeue": state,
            "scontrol": f"""[ "$1" != requeue ] || {requeue} || exit 1
                [ "$1" = show ] && {show} || echo "$@" >> "{self.calls}\"""",
            "sbatch": fits,
            "sleep": "true",
        }.items():
            (bin_ / name).write_text(f"#!/bin/bash\n{body}\n")
            (bin_ / name).chmod(0o755)
        array = {} if element is None else {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(element)}
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": str(nodes)}
        return subprocess.run(
            ["bash", "-c", script({"run_dir": str(self.run)}, **profile)],
            env={"PATH": f"{bin_}:/usr/bin:/bin"} | job | array,
            capture_output=True,
            text=True,
            check=False,
        )

    def end(self, *arguments, **changes):
        """The same: the script's exit code, and what it had SLURM do."""
        done = self.start(*arguments, **changes)
        assert done.stderr == ""
        return done.returncode, self.calls.read_text().splitlines()


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.mark.parametrize(
    ("srun", "done", "state", "calls"),
    [
        (143, 1, "RUNNING", []),
        (143, 0, "RUNNING", []),
        (143, 75, "RUNNING", REQUEUED),
        (0, None, "RUNNING", []),
        (1, None, "RUNNING", []),
        (2, None, "RUNNING", []),
        (3, None, "RUNNING", []),
        (75, None, "CANCELLED", []),
        (75, None, "RUNNING", REQUEUED),
        (137, None, "RUNNING", REQUEUED),
    ],
)
def test_the_first_nodes_word_or_else_sruns_says_whether_the_job_is_queued_again(srun, done, state, calls, job):
    if done is not None:
        job.says(done=str(done))
    assert job.end(srun, state=f"echo {state}") == (srun if done is None else done, calls)


def test_an_element_of_an_array_speaks_of_itself_where_its_id_is_that_of_the_whole(job):
    state = '[ "$3" = 7_1 ] && echo RUNNING || printf "RUNNING\\nRUNNING\\n"'
    called = ["requeue 7_1", "update JobId=7_1 ExcNodeList=n9"]
    assert job.end(75, state=state, element=1, begins=False) == (75, called)
    assert [event["job_id"] for event in job.events("start_failed")] == ["7_1"]


def test_a_controller_that_does_not_answer_for_a_while_is_asked_again(job, tmp_path):
    def later(name):
        return f"{{ echo >> {tmp_path}/{name}; [ $(wc -l < {tmp_path}/{name}) -gt 2 ]; }}"

    assert job.end(75, state=f"{later('state')} && echo RUNNING", requeue=later("requeue")) == (75, REQUEUED)
    assert job.end(75, state="exit 1") == (75, [])  # not for ever


def test_a_supervisor_that_was_killed_from_outside_has_its_node_left_out(job):
    log = "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Killed\n"
    assert job.end(137, log) == (137, ["requeue 7", "update JobId=7 ExcNodeList=n9,n2"])
    assert [event["host"] for event in job.events("supervisor_lost")] == ["n2"]


@pytest.mark.parametrize("code", [75, 137])
def test_tasks_that_srun_kills_after_another_has_left_are_not_lost(code, job):
    assert job.end(code, LEFT(code)) == (code, REQUEUED)
    assert job.events("supervisor_lost") == []


def test_where_no_other_nodes_fit_a_lost_one_is_used_again(job):
    log = "srun: error: n2: task 1: Killed\n"
    assert job.end(137, log, fits='[ "$2" != --exclude=n9,n2 ]') == (137, REQUEUED)


def test_the_node_that_fails_its_check_is_left_out_not_the_one_that_srun_kills(job):
    job.says(bad="n2")
    assert job.end(137, LEFT(3), begins=False) == (3, ["requeue 7", "update JobId=7 ExcNodeList=n9,n2"])
    assert job.events("supervisor_lost") == []


def test_nodes_that_the_first_node_found_bad_are_left_out(job):
    job.says(done="3", bad="n3,n4")
    assert job.end(3, nodes=3, begins=False)[1] == ["requeue 7", "update JobId=7 ExcNodeList=n9,n3,n4"]


@pytest.mark.parametrize(
    ("bad", "nodes", "fits"), [("n2", 2, "false"), ("n1,n2", 2, "true"), (None, 2, "true"), ("n1", 1, "false")]
)
def test_exit_code_3_stands_where_there_is_no_node_to_blame_or_none_to_take_instead(bad, nodes, fits, job):
    if bad:
        job.says(bad=bad)
    assert job.end(137, LEFT(3), nodes=nodes, fits=fits, begins=False) == (3, [])


@pytest.mark.parametrize(("code", "last"), [(137, 1), (3, 3)])
def test_starts_that_end_before_a_worker_begins_are_counted(code, last, job):
    if code == 3:
        job.says(bad="n2")
    ended = [job.end(code, begins=False) for _ in range(MAX_STARTS)]
    assert [bool(calls) for _, calls in ended] == [True, True, False]
    assert ended[-1][0] == last
    assert "3 starts of the job in a row ended before training" in job.events("refused")[0]["message"]
    job.event("launched")
    assert job.end(code, begins=False)[1] != []
    assert job.end(75)[1] != []  # one that trains begins the count anew
    assert [bool(job.end(code, begins=False)[1]) for _ in range(MAX_STARTS)] == [True, True, False]


@pytest.mark.parametrize(
    ("setup", "code", "said"),
    [
        (
            ["x=1  # a comment", "if [ $x = 1 ]; then", "export A=b", "fi", "[ -d /no ] || true", "unset y; echo $y"],
            0,
            "",
        ),
        (["true", "module load cuda/12 'x'", "touch /never"], 3, "(exit code 127): module load cuda/12 'x'\n"),
        (["false  # a comment"], 3, "the profile's setup failed (exit code 1): false  # a comment\n"),
    ],
)
def test_a_line_of_setup_that_fails_ends_the_job_and_is_named(setup, code, said, job):
    done = job.start(75, setup=setup)
    assert done.returncode == (code or 75)
    assert done.stderr.endswith(said)
    assert bool(job.events("attempt_started")) == (code == 0)
