"""What clusters do between `launch` and a job: answers that are lost, variables that are not handed on, shells inside
of steps, limits of arrays, maintenance."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backends.slurm import client as slurm_client
from launcher.backends.slurm import job_end, submission
from launcher.backends.slurm import submit as slurm
from launcher.commands import sweep
from launcher.plan.plan import make_plan
from launcher.plan.profile import Profile
from launcher.plan.request import Request
from launcher.plan.topology import Topology
from launcher.recipe.schema import LaunchConfig, PostConfig, Recipe
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from tests.nets import FACTORY

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
SMALL = ("--profile", "dev", "train.epochs=1", "batch.size=64", "post.enabled=false", FACTORY)
DEADLINE_S = 240


@pytest.fixture
def here(slurm_cluster, monkeypatch):
    """Have this process's own commands speak to the cluster."""
    monkeypatch.setenv("SLURM_CONF", slurm_cluster["SLURM_CONF"])


@pytest.fixture
def site(tmp_path, slurm_cluster):
    """A PATH on which `sbatch` is a site's own wrapper: the lines are shell, with the real one as "$sbatch"."""

    def wrap(*lines):
        wrapper = tmp_path / "bin" / "sbatch"
        wrapper.parent.mkdir()
        real = shutil.which("sbatch", path=slurm_cluster["PATH"])
        asks = 'case " $* " in *" --test-only "*) exec "$sbatch" "$@" ;; esac'
        wrapper.write_text("\n".join(["#!/bin/bash", f"sbatch={real}", asks, *lines, ""]))
        wrapper.chmod(0o755)
        return f"{wrapper.parent}:{slurm_cluster['PATH']}"

    return wrap


def launch(environment, *arguments, within=(), cwd=None):
    return subprocess.run(
        [*within, sys.executable, "-m", "launcher", *arguments],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )


def a_script(folder, *options):
    file = folder / "job.sh"
    output = f"#SBATCH --job-name=mine --output={folder}/logs/slurm-%j.log --nodes=1"
    file.write_text("\n".join(["#!/bin/bash", output, *(f"#SBATCH {option}" for option in options), "true", ""]))
    (folder / "logs").mkdir(exist_ok=True)
    return file


@pytest.mark.parametrize(
    ("lines", "is_submitted"),
    [
        (('echo "Welcome, 3"', 'echo "job 12 quota"', '"$sbatch" "$@"', 'echo "Have a nice day"'), True),
        (('"$sbatch" "$@" | sed "s/^/Submitted batch job /"',), True),
        (('"$sbatch" "$@" > /dev/null',), True),
        (('"$sbatch" "$@"', "echo 'Socket timed out on send/recv operation' >&2", "exit 1"), True),
        (('"$sbatch" "$@" > /dev/null', "sleep 600"), True),
        (('( sleep 3; "$sbatch" "$@" ) > /dev/null 2>&1 &', "echo 'Socket timed out' >&2", "exit 1"), True),
        (("echo 'Job violates accounting policy' >&2", "exit 1"), False),
    ],
    ids=["greeting", "not parsable", "no answer", "an error", "time-out", "later", "refused"],
)
def test_a_job_is_known_whatever_sbatch_answers(lines, is_submitted, site, here, tmp_path, monkeypatch):
    earlier = submission.submit(a_script(tmp_path), name="mine", logs=tmp_path / "logs")
    monkeypatch.setenv("PATH", site(*lines))
    monkeypatch.setattr(slurm_client, "TIMEOUT_S", 12)
    monkeypatch.setattr(submission, "PAUSE_S", 3.0)
    how = {"name": "mine", "logs": tmp_path / "logs", "known": [earlier]}
    if is_submitted:
        job_id = submission.submit(a_script(tmp_path), **how)
        assert int(job_id) > int(earlier)
        assert slurm_client.job_states([job_id])[job_id].state in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED")
    else:
        with pytest.raises(slurm_client.SlurmError, match="violates accounting policy"):
            submission.submit(a_script(tmp_path), **how)


def test_a_job_that_a_site_submits_without_variables_trains_and_says_what_it_lacks(site, slurm_cluster, tmp_path):
    path = site('exec "$sbatch" --export=NONE "$@"')
    environment = slurm_cluster | {"PATH": path, "MLFLOW_X": "1", "SBATCH_TIMELIMIT": "1", "SQUEUE_PARTITION": "high"}
    environment |= {"SBATCH_QOS": "normal", "MLFLOW_TOLD": "here"}
    folder = 'it\'s "a" run & ü'
    arguments = ("--procs", "1", "--nodes", "1", "--backend", "slurm", "profile.env={MLFLOW_TOLD: here}", *SMALL)
    done = launch(environment, "debug", *arguments, "--run-dir", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(tmp_path / folder)
    assert run.read_status()["state"] == "completed"
    (lost,) = events(run, "variables_lost")
    assert "MLFLOW_X" in lost["names"]
    assert "MLFLOW_TOLD" not in lost["names"]  # what the script sets does reach the steps
    assert re.search(r"warning: the job came without .*\bMLFLOW_X\b.* of the shell", done.stdout)
    assert "SBATCH_TIMELIMIT=1 is ignored; its place is the profile's timeout_min" in done.stderr
    assert "SBATCH_QOS: the job's qos is normal" in done.stderr
    (script,) = run.slurm.glob("*_submission.sh")
    assert "#SBATCH --qos=normal" in script.read_text()


def test_in_a_shell_inside_of_a_step_it_shares_what_that_holds(slurm_cluster, tmp_path):
    within = ("srun", "--quiet", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--export=ALL,SLURM_EXPORT_ENV=NONE")
    arguments = ("--procs", "1", "--backend", "slurm", *SMALL, "--run-dir", "run")
    done = launch(slurm_cluster, "debug", *arguments, within=within, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunDir(tmp_path / "run").read_status()["state"] == "completed"


def test_an_allocation_with_too_few_cpus_is_refused_with_what_would_do(slurm_cluster, tmp_path):
    within = ("salloc", "--quiet", "--nodes=1", "--ntasks=1", "--cpus-per-task=1")
    arguments = ("--procs", "1", "--backend", "slurm", *SMALL[2:], "--run-dir", "run")
    done = launch(slurm_cluster, "debug", *arguments, within=within, cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "holds 1; ask for more (salloc --cpus-per-task=8) or give a profile with cpus_per_gpu: 1" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_of_more_runs_than_an_array_may_have_becomes_several(here, tmp_path, monkeypatch):
    assert slurm_client.max_array_size() == 1001
    monkeypatch.setattr(slurm_client, "max_array_size", lambda: 2)
    profile = Profile(partition="low", cpus_per_gpu=1, timeout_min=5, python="true", setup=['touch "$run/was-here"'])
    machine = Topology(num_cores=1, num_gpus=0, host="h", has_slurm=True, cwd=str(tmp_path))
    asked = Recipe(launch=LaunchConfig(procs=1, backend="slurm"), post=PostConfig(enabled=False))
    base = tmp_path / "sweep"
    plans = [
        make_plan(asked, machine, Request(run_id=f"r-{number}", run_dir=str(base / str(number))), profile)
        for number in range(5)
    ]
    arrays = sweep._arrays(plans, base, parallel=2)
    assert [len(runs) for _, runs in arrays] == [2, 2, 1]
    for plan in plans:
        RunDir(plan.run_dir).create()
    (base / "runs.txt").write_text("".join(f"{plan.run_dir}\n" for plan in plans))
    assert slurm.submit_arrays(base, arrays, [""] * 5, detach=False, in_turn=True)
    assert [Path(plan.run_dir, "was-here").exists() for plan in plans] == [True] * 5
    ids = [events(RunDir(plan.run_dir), "submitted")[0]["job_id"] for plan in plans]
    assert [job_id.partition("_")[2] for job_id in ids] == ["0", "1", "0", "1", "0"]


def test_before_a_maintenance_a_shorter_job_is_advised_and_starts(here, make_run, tmp_path):
    run = make_run("run", state="pending")
    run.write_plan(replace(run.read_plan(), profile=Profile(timeout_min=60, lead_s=30)), run.read_launched())
    window = ("reservation=repair", "starttime=now+30minutes", "duration=60", "flags=maint", "nodes=ALL", "users=root")
    slurm_client.run("scontrol", "create", *window)
    try:
        job_id = submission.submit(a_script(tmp_path, "--time=60"), name="mine", logs=tmp_path / "logs")
        end = time.monotonic() + DEADLINE_S
        while "aintenance" not in (job := slurm_client.job_states([job_id])[job_id]).reason:
            assert time.monotonic() < end, job
            time.sleep(0.5)
        (said,) = [line for line in job_end.explain(run, job) if line.startswith("what to do")]
        assert "a maintenance begins at 20" in said
        assert "(repair), and the job may take 60 minutes (timeout_min), which is longer than until then" in said
        minutes = int(said.rpartition("profile.timeout_min=")[2])
        assert 20 < minutes < 30
        shorter = submission.submit(a_script(tmp_path, f"--time={minutes}"), name="two", logs=tmp_path / "logs")
        while slurm_client.job_states([shorter])[shorter].state != "COMPLETED":
            assert time.monotonic() < end
            time.sleep(0.5)
    finally:
        slurm_client.run("scontrol", "delete", "reservation=repair")
        slurm_client.run("scancel", "--name=mine,two")
