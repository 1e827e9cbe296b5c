"""Runs on a real cluster, and what clusters do to them: preempt, cut short, kill, disconnect, cancel."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.numpy import load_file

from launcher.runs.history import events, next_attempt
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl
from tests.nets import FACTORY, SLOW
from tests.tracking.hand_made import rows_of, steps_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes/debug.yaml")
TWO_NODES = ("--nodes", "2", "--procs", "2", "--profile", "dev")
SMALL = (
    "batch.size=16",
    "launch.max_restarts=3",
    "tracking.log_every=1",
    "train.early_stopping.patience=null",
    "post.enabled=false",
    FACTORY,
)
OFTEN = "train.checkpoint.every_steps=5"
ALLOCATION = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")
DEADLINE_S = 300


class Launched:
    """A run that `launch` was started for."""

    def __init__(self, run, process, environment):
        self.run = run
        self.process = process
        self.environment = environment

    def slurm(self, *command, check=True):
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=check, timeout=DEADLINE_S
        ).stdout

    @property
    def job_id(self):
        (submitted,) = events(self.run, "submitted")
        return submitted["job_id"]

    @property
    def step(self):
        return max((line["step"] for line in read_jsonl(self.run.metrics)), default=0)

    def wait_until(self, condition, seconds=DEADLINE_S):
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.1)

    def wait_for_step(self, step):
        self.wait_until(lambda: self.step >= step)

    def finish(self, seconds=DEADLINE_S):
        """Its exit code and what it printed."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def processes(self, host=None):
        """Living supervisors and workers of the run, on one node or all."""
        found, namespace = [], host and self.namespace(host)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # it has ended meanwhile
                command = " ".join(process.cmdline())
                if str(self.run.path) in command and any(
                    word in command for word in ("_submit", "slurm.task", "slurm.member")
                ):
                    where = Path(f"/proc/{process.pid}/ns/uts").readlink()
                    if host is None or where == namespace:
                        found += [process] if "srun" not in process.name() else []
        return found

    def leaves_nobody(self):
        """Whether all of them end, in a while."""
        end = time.monotonic() + DEADLINE_S
        while self.processes() and time.monotonic() < end:
            time.sleep(0.1)
        return self.processes() == []

    def namespace(self, host):
        """The UTS namespace of a node's slurmd."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # another one, which has just ended
                if process.name() == "slurmd" and process.cmdline()[-1:] == [host]:
                    with_conf = process.environ().get("SLURM_CONF", " ".join(process.cmdline()))
                    if Path(self.environment["SLURM_CONF"]).parent.name in with_conf + " ".join(process.cmdline()):
                        return Path(f"/proc/{process.pid}/ns/uts").readlink()
        raise AssertionError(f"no slurmd of {host}")

    def supervisor(self, host):
        own = self.processes(host)
        (top,) = [process for process in own if process.ppid() not in {other.pid for other in own}]
        return top

    def workers(self, host):
        return self.supervisor(host).children()


@pytest.fixture
def launch_on(tmp_path):
    """Start `launch` on a cluster; what is left of its jobs is cancelled at the end."""
    started = []

    def start(environment, *arguments, name="run", within=(), resume=None):
        environment = environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        what = ["resume", str(resume.path)] if resume else [*arguments, "--run-dir", str(tmp_path / name)]
        process = subprocess.Popen(
            [*within, sys.executable, "-m", "launcher", *what],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(Launched(resume or RunDir(tmp_path / name), process, environment))
        return started[-1]

    yield start
    for launched in started:
        for submitted in events(launched.run, "submitted"):
            launched.slurm("scancel", "--quiet", "--full", "--signal=KILL", submitted["job_id"], check=False)
        launched.process.kill()
        launched.process.wait()
        launched.process.stdout.close()


@pytest.fixture
def launch(launch_on, slurm_cluster):
    return lambda *arguments, name="run": launch_on(slurm_cluster, RECIPE, *TWO_NODES, *SMALL, *arguments, name=name)


@pytest.fixture
def patched(tmp_path):
    """Have the nodes' Python run some code when it starts; returns the override that does."""

    def patch(code):
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(code)
        return f"profile.env={{PYTHONPATH: '{tmp_path / 'site'}:{ROOT}'}}"

    return patch


def ends(run):
    return [(event["attempt"], event["cause"]) for event in events(run, "attempt_ended")]


def hosts(run, attempt):
    return {event["host"] for event in events(run, "attempt_started") if event["attempt"] == attempt}


def weights(run):
    return {name: tensor.tobytes() for name, tensor in load_file(run.last_checkpoint / "model.safetensors").items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, slurm_cluster):
    """Two epochs on two nodes with two workers each that nothing happened to, and what `launch` printed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    output = _launch(slurm_cluster, RECIPE, *TWO_NODES, *SMALL, "train.epochs=2", "--run-dir", str(folder))
    return RunDir(folder), output


def test_two_nodes_train_to_the_end_from_one_command(undisturbed, slurm_cluster):
    run, output = undisturbed
    assert run.read_status()["state"] == "completed"
    assert len(hosts(run, 1)) == 2
    assert run.read_plan().world_size == 4
    assert "epoch 2/2  val" in output
    assert re.search(r"job \d+ running on n\[\d-\d\]", output)
    assert len(list(run.attempt_logs(1).glob("rank-*.log"))) == 4
    assert ends(run) == []
    (script,) = run.slurm.glob("*_submission.sh")
    dry = subprocess.run(
        [sys.executable, "-m", "launcher", "resume", str(run.path), "--dry-run"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    shown = re.split(r"^(?:script\n|code   )", dry.stdout, flags=re.MULTILINE)[1]  # without SLURM on PATH
    assert shown == script.read_text(), dry.stdout
    assert "completed already" in _launch(slurm_cluster, "resume", str(run.path))
    assert len(events(run, "submitted")) == 1


def test_preempted_in_mid_epoch_it_ends_with_the_very_same_bits(launch, undisturbed):
    launched = launch("train.epochs=2", SLOW)
    launched.wait_for_step(12)
    launched.slurm("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    code, output = launched.finish()
    assert code == 0, output
    run = launched.run
    assert ends(run) == [(1, "preempted")]
    (resumed,) = events(run, "resumed")
    assert 12 <= resumed["step"] < 46
    assert resumed["offset"] > 0
    assert launched.slurm("sacct", "-n", "-X", "-D", "-j", launched.job_id, "-o", "State").split() == [
        "REQUEUED",
        "COMPLETED",
    ]
    assert weights(run) == weights(undisturbed[0])
    steps = [line["step"] for line in read_jsonl(run.metrics) if line["split"] == "train"]
    assert steps == sorted(set(steps))


def test_a_login_node_tracks_it_live_through_a_requeue(launch, tmp_path):
    launched = launch("train.epochs=2", SLOW, "tracking.wandb.mode=disabled")
    run = launched.run
    launched.wait_for_step(2)
    command = [sys.executable, "-m", "launcher", "track", str(run.path), "--wandb", "--offline"]
    environment = launched.environment | {"HOME": str(tmp_path)}
    follower = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        launched.wait_until(lambda: steps_of(run))  # it is there while the run goes on
        launched.wait_for_step(12)
        launched.slurm("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
        code, output = launched.finish()
        assert code == 0, output
        said, _ = follower.communicate(timeout=DEADLINE_S)
    finally:
        follower.kill()
    assert follower.returncode == 0, said
    assert ends(run) == [(1, "preempted")]
    assert "is completed, and its record is complete" in said
    lines = [line["step"] for line in read_jsonl(run.metrics) if line["split"] == "train"]
    assert [row["step"] for row in rows_of(run) if "train/loss" in row] == sorted(set(lines))
    assert len(list(run.wandb.glob("offline-run-*"))) == 1  # the follower saw it all


SLOW_TWICE = """
import os
import time

from launcher.engine import schedule

derive_seed = schedule.derive_seed


def that_is_slow_twice(*numbers):
    if len(numbers) == 4 and os.environ["LAUNCH_ATTEMPT"] in ("1", "2"):
        time.sleep(2)
    return derive_seed(*numbers)


schedule.derive_seed = that_is_slow_twice
"""


def test_the_time_limit_cuts_it_and_it_goes_on_to_the_exports_in_a_job_of_their_own(launch, patched):
    post = ("post.enabled=true", "post.profile=dev", "post.quantize=[]")
    # The shortest limit that SLURM knows is a minute, and it looks every thirty seconds whether a job is near its end.
    short = ("--procs", "1", "profile.timeout_min=1", "profile.lead_s=50")
    launched = launch("train.epochs=1", "batch.size=32", *short, *post, patched(SLOW_TWICE))
    run = launched.run
    launched.wait_until(lambda: len(ends(run)) == 2)
    launched.slurm("scontrol", "update", f"JobId={launched.job_id}", "TimeLimit=10")  # enough for the rest
    code, output = launched.finish()
    assert code == 0, output
    assert ends(run) == [(1, "time_limit"), (2, "time_limit")]
    assert run.read_status()["epoch"] == 1
    (made,) = events(run, "export")
    assert made["accepted"]
    (submitted,) = events(run, "post_submitted")
    assert launched.job_id != submitted["job_id"]
    for told in (run.supervisor_log(submitted["job_id"], 0).read_text(), output):
        assert re.search(r"model\.onnx +top1", told)
    assert run.report_html.stat().st_mtime >= run.export_manifest.stat().st_mtime


def test_a_killed_worker_is_started_again_in_the_same_job(launch, undisturbed):
    launched = launch("train.epochs=2", OFTEN, SLOW)
    launched.wait_for_step(12)
    (*_, host) = sorted(hosts(launched.run, 1))
    launched.workers(host)[0].kill()
    code, output = launched.finish()
    assert code == 0, output
    assert {cause for _, cause in ends(launched.run)} == {"lost_worker"}
    assert launched.slurm("squeue", "--noheader", "--states=all", "--format=%r", "--job", launched.job_id).split() == [
        "None"
    ]
    assert len(list(launched.run.slurm.glob("meeting-*"))) == 1
    assert weights(launched.run) == weights(undisturbed[0])


@pytest.mark.parametrize("node", [0, -1], ids=["the first", "the last"])  # where the nodes meet, and another one
def test_a_killed_supervisor_has_the_run_go_on_without_its_node(launch, node):
    launched = launch("train.epochs=2", OFTEN, SLOW)
    launched.wait_for_step(12)
    host = sorted(hosts(launched.run, 1))[node]
    start = time.monotonic()
    launched.supervisor(host).kill()
    launched.wait_until(lambda: ends(launched.run))
    print(f"started again {time.monotonic() - start:.0f} s after a supervisor was killed")
    code, output = launched.finish()
    assert code == 0, output
    assert ends(launched.run) == [(1, "lost_node")]
    (lost,) = events(launched.run, "supervisor_lost")
    assert lost["host"] == host
    assert host not in hosts(launched.run, 2)
    assert launched.leaves_nobody()


def test_a_node_whose_network_is_cut_is_left_behind(launch, slurm_machine):
    launched = launch("train.epochs=2", OFTEN, SLOW)
    launched.wait_for_step(12)
    (*_, host) = sorted(hosts(launched.run, 1))
    start = time.monotonic()
    assert slurm_machine.run("cut", host).returncode == 0
    try:
        launched.wait_until(lambda: ends(launched.run))
        print(f"started again {time.monotonic() - start:.0f} s after the network of a node was cut")
        code, output = launched.finish()
    finally:
        slurm_machine.run("heal", host)
    assert code == 0, output
    (end,) = events(launched.run, "attempt_ended")
    assert end["cause"] == "lost_node"
    assert host in end["message"]
    assert host not in hosts(launched.run, 2)


@pytest.mark.parametrize("by", ["scancel", "launch cancel"])
def test_nothing_is_left_of_a_cancelled_run(launch, by, slurm_cluster):
    launched = launch("train.epochs=400", SLOW)
    launched.wait_for_step(5)
    assert len(launched.processes()) >= 6
    if by == "scancel":
        launched.slurm("scancel", launched.job_id)
    else:
        command = [sys.executable, "-m", "launcher", "cancel", str(launched.run.path)]
        subprocess.run(command, env=slurm_cluster | {"PYTHONPATH": str(ROOT)}, check=True, timeout=DEADLINE_S)
    code, output = launched.finish()
    assert code == 75, output
    assert launched.leaves_nobody()
    assert launched.run.last_checkpoint.exists()
    assert launched.run.read_status()["state"] == "cancelled"
    # Over, and no script of it left that could queue it again.
    assert "JobState=CANCELLED" in launched.slurm("scontrol", "show", "job", launched.job_id)
    assert not any("slurm_script" in command and launched.job_id in command for command in _commands())


def test_detached_it_returns_at_once_and_goes_on_and_nothing_else_may(launch, slurm_cluster):
    start = time.monotonic()
    launched = launch("train.epochs=2", SLOW, "--detach")
    code, output = launched.finish()
    print(f"returned after {time.monotonic() - start:.1f} s")
    assert code == 0
    assert "next: launch logs" in output
    assert launched.run.read_status()["state"] != "completed"
    listed = json.loads(_launch(slurm_cluster, "ps", str(launched.run.path.parent), "--json"))
    assert [(row["job_id"], row["job_state"] in ("PENDING", "RUNNING")) for row in listed] == [(launched.job_id, True)]
    again = [sys.executable, "-m", "launcher", "resume", str(launched.run.path)]
    environment = slurm_cluster | {"PYTHONPATH": str(ROOT)}
    second = subprocess.run(again, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert second.returncode == 2, second.stdout
    assert f"runs as job {launched.job_id}" in second.stderr
    end = time.monotonic() + DEADLINE_S
    while launched.run.read_status()["state"] != "completed":
        assert time.monotonic() < end
        time.sleep(0.5)


def _commands():
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            yield " ".join(process.cmdline())


def _launch(environment, *arguments):
    command = [sys.executable, "-m", "launcher", *arguments]
    done = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


BUG = """
from launcher.engine import schedule

derive_seed = schedule.derive_seed


def with_a_bug(*numbers):
    if len(numbers) == 4 and numbers[1:3] == (7, 2):  # step 7 of rank 2
        raise ZeroDivisionError("a bug in the user's own code")
    return derive_seed(*numbers)


schedule.derive_seed = with_a_bug
"""


def test_a_worker_that_raises_ends_the_run_and_why_shows_its_traceback_first(launch, slurm_cluster, patched, tmp_path):
    launched = launch("train.epochs=1", patched(BUG))
    code, output = launched.finish()
    assert code == 1, output
    assert "ZeroDivisionError: a bug in the user's own code" in output
    why = _launch(slurm_cluster, "why", str(launched.run.path))
    second = why.splitlines()[1]
    assert second.startswith("first failure: rank 2 on n")
    assert second.endswith("ZeroDivisionError: a bug in the user's own code")
    assert "with_a_bug" in why
    assert launched.run.read_status()["state"] == "failed"
    assert launched.leaves_nobody()
    (tmp_path / "site" / "sitecustomize.py").unlink()  # mended
    _launch(slurm_cluster, "resume", str(launched.run.path))
    assert launched.run.read_status()["state"] == "completed"


def test_a_bad_image_is_left_out_on_all_nodes(launch_on, slurm_cluster, tmp_path):
    rng = np.random.default_rng(0)
    for split, number, name in itertools.product(("train", "val"), range(13), ("cat", "dog")):
        folder = tmp_path / "images" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), "uint8")).save(folder / f"{number}.png")
    bad = tmp_path / "images/train/cat/7.png"
    bad.write_bytes(bad.read_bytes()[:200])
    arguments = (
        f"data.path={tmp_path / 'images'}",
        "data.name=imagefolder",
        "batch.size=3",
        "train.epochs=2",
    )
    launched = launch_on(slurm_cluster, RECIPE, *TWO_NODES, *SMALL, *arguments, "data.on_bad_image=quarantine")
    code, output = launched.finish()
    assert code == 0, output
    assert len(hosts(launched.run, 1)) == 2
    assert [image["path"] for image in json.loads(launched.run.bad_images.read_text())["images"]] == ["train/cat/7.png"]
    lines = list(read_jsonl(launched.run.metrics))
    for epoch in range(2):
        assert sum(line["samples"] for line in lines if (line["split"], line["epoch"]) == ("train", epoch)) == 25


def test_two_runs_of_the_same_second_on_the_same_nodes_do_not_meet(launch):
    both = ("train.epochs=2", SLOW, "profile.sbatch={nodelist: 'n[1-2]'}")
    one = launch(*both, name="one")
    other = launch(*both, "seed=1", name="other")
    for launched in (one, other):
        code, output = launched.finish()
        assert code == 0, output
    assert hosts(one.run, 1) == hosts(other.run, 1) == {"n1", "n2"}
    times = [
        [event["time"] for kind in ("first_step", "training_ended") for event in events(launched.run, kind)]
        for launched in (one, other)
    ]
    assert times[0][0] < times[1][1]
    assert times[1][0] < times[0][1]  # they did run at the same time
    ports = [json.loads(next(launched.run.slurm.glob("meeting-*")).read_text())["port"] for launched in (one, other)]
    assert ports[0] != ports[1]


def test_without_accounting_it_is_all_the_same(own_cluster, launch_on):  # in this order: jobs end before the cluster
    environment = own_cluster.up("--no-accounting")
    launched = launch_on(environment, RECIPE, *TWO_NODES, *SMALL, SLOW, "train.epochs=2", "--detach")
    code, output = launched.finish()
    assert code == 0, output
    launched.process = subprocess.Popen(["sleep", "300"], stdout=subprocess.PIPE, text=True)
    launched.wait_for_step(5)
    _launch(environment, "cancel", str(launched.run.path))
    listed = json.loads(_launch(environment, "ps", str(launched.run.path), "--json"))
    assert [row["state"] for row in listed] == ["cancelled"]
    launched.slurm("scontrol", "show", "job", launched.job_id)
    _launch(environment, "resume", str(launched.run.path))
    assert launched.run.read_status()["state"] == "completed"


@pytest.mark.parametrize("by", [None, signal.SIGINT])
def test_in_an_allocation_it_is_a_step(launch_on, slurm_cluster, by, undisturbed, tmp_path):
    launched = launch_on(
        slurm_cluster, RECIPE, *TWO_NODES, *SMALL, *([SLOW] if by else []), "train.epochs=2", within=ALLOCATION
    )
    if by:
        launched.wait_for_step(5)
        (own,) = [child for child in psutil.Process(launched.process.pid).children() if "launcher" in child.cmdline()]
        own.send_signal(by)
        code, output = launched.finish()
        assert code == 75, output
        assert launched.leaves_nobody()
        again = launch_on(slurm_cluster, within=ALLOCATION, resume=launched.run)
        code, output = again.finish()
    else:
        code, output = launched.finish()
    assert code == 0, output
    assert events(launched.run, "submitted") == []
    assert weights(launched.run) == weights(undisturbed[0])


# Nodes that are lost: tests/faults/nodes.py.
SHRINKS = ("--nodes", "2:3", "--procs", "1")


def test_a_job_that_shrinks_and_grows_is_preempted_as_any_other(launch):
    launched = launch(*SHRINKS, SLOW, "train.epochs=2")
    launched.wait_for_step(8)
    launched.slurm("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    code, output = launched.finish()
    assert code == 0, output
    assert ends(launched.run) == [(1, "preempted")]
    assert [event["step"] >= 8 for event in events(launched.run, "resumed")] == [True]
    assert "Restarts=1" in launched.slurm("scontrol", "show", "job", launched.job_id)
    assert launched.leaves_nobody()


def test_in_an_allocation_a_run_that_shrinks_and_grows_is_a_step_a_node(launch_on, slurm_cluster):
    within = ("salloc", "--quiet", "--no-kill", "--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=2")
    arguments = (*TWO_NODES, *SHRINKS, *SMALL, SLOW, "model.factory_args={attempts: 9}", "train.epochs=20", OFTEN)
    launched = launch_on(slurm_cluster, RECIPE, *arguments, within=within)
    launched.wait_for_step(5)
    launched.supervisor("n2").kill()
    launched.wait_until(lambda: any(len(event["members"]) == 3 for event in events(launched.run, "regrouped")))
    (own,) = [child for child in psutil.Process(launched.process.pid).children() if "launcher" in child.cmdline()]
    own.send_signal(signal.SIGINT)
    code, output = launched.finish()
    assert code == 75, output
    assert launched.leaves_nobody()
    assert launched.run.read_status()["state"] == "preempted"


def test_a_sweep_is_a_job_array_and_ends_in_a_comparison(launch_on, slurm_cluster, tmp_path):
    size = ("--nodes", "1", "--procs", "1", "--profile", "dev", "train.epochs=1", *SMALL[1:], SLOW)
    sweep = launch_on(
        slurm_cluster, RECIPE, "optim.lr=0.05,0.02,0.01", "--sweep", "--parallel", "2", *size, name="sweep"
    )
    names = ["0-optim.lr=0.05", "1-optim.lr=0.02", "2-optim.lr=0.01"]
    runs = [RunDir(tmp_path / "sweep" / name) for name in names]
    sweep.wait_until(lambda: len(list(read_jsonl(runs[2].metrics))) > 5)
    jobs = [events(run, "submitted")[0]["job_id"] for run in runs]
    assert [job.partition("_")[2] for job in jobs] == ["0", "1", "2"]
    sweep.slurm("scancel", "--signal=USR2", jobs[2])  # which has the id of the whole array, too
    code, output = sweep.finish()
    assert code == 0, output
    assert [run.read_status()["state"] for run in runs] == ["completed"] * 3
    assert [ends(run) for run in runs] == [[], [], [(1, "time_limit")]]
    assert [next_attempt(run) for run in runs] == [2, 2, 3]
    spans = [(events(run, "attempt_started")[0]["time"], events(run, "training_ended")[0]["time"]) for run in runs]
    for start, _ in spans:
        assert sum(begin <= start < end for begin, end in spans) <= 2  # no more at the same time than was said
    table = output.rpartition(" completed\n")[2]  # after the last word of a job
    assert all(name in table for name in names)


BAD_NODE = """
import os

from launcher.system import processes

if os.uname().nodename == "n2":
    processes.die_with_parent = lambda: os._exit(9)  # the first thing that the all-reduce does
"""


def test_a_bad_node_is_found_before_training_and_left_out(launch, patched):
    three = ("--nodes", "3", "--procs", "1", "batch.size=32")
    launched = launch("train.epochs=1", "launch.preflight=true", *three, patched(BAD_NODE))
    code, output = launched.finish()
    assert code == 0, output
    (failed,) = events(launched.run, "preflight_failed")
    assert failed["problems"] == {"n2": "an all-reduce with it does not work"}
    assert hosts(launched.run, 1) == {"n1", "n3", "n4"}
    assert ends(launched.run) == []


OTHER_NETWORK = """
import os

from launcher.system import network

if os.uname().nodename == "n2":
    network.address_of = lambda interface: None
"""


def test_a_node_without_the_interface_ends_the_job_where_there_is_no_other(launch, patched, slurm_cluster):
    wanted = ("profile.interface=eth0", 'profile.exclude="n[3-4]"')
    launched = launch("--procs", "1", *wanted, patched(OTHER_NETWORK))
    code, output = launched.finish()
    assert code == 3, output
    assert "n2: has no interface eth0" in output
    assert events(launched.run, "supervisor_lost") == []
    job = launched.slurm("scontrol", "show", "job", launched.job_id)
    assert "Restarts=0" in job
    assert "ExcNodeList=n[3-4]\n" in job
    why = _launch(slurm_cluster, "why", str(launched.run.path))
    assert ": failed, attempt 0" in why
    assert "what to do: name one that all nodes have: profile.interface" in why


def test_what_cannot_start_is_refused_and_a_setup_that_fails_is_named(slurm_cluster, tmp_path):
    def launch(*arguments):
        command = [sys.executable, "-m", "launcher", RECIPE, *TWO_NODES, *SMALL, *arguments]
        environment = slurm_cluster | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE_S
        )
        return done.returncode, done.stderr

    code, said = launch("profile.exclude=nx")
    assert (code, list(tmp_path.iterdir())) == (3, [])
    assert "nothing was submitted\n  sbatch --test-only: allocation failure: Invalid node name specified" in said
    code, said = launch("profile.setup=[module load cuda]")
    assert code == 3
    assert "the profile's setup failed (exit code 127): module load cuda" in said


def test_doctor_checks_nodes_and_names_a_bad_one(slurm_cluster, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BAD_NODE)
    command = [sys.executable, "-m", "launcher", "doctor", "--nodes", "4", "--profile", "dev", "--json"]
    for path, code, problems in (
        (ROOT, 0, {}),
        (f"{tmp_path}:{ROOT}", 3, {"n2": "an all-reduce with it does not work"}),
    ):
        environment = slurm_cluster | {"PYTHONPATH": str(path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert found["problems"] == problems
        assert [facts["host"] for facts in found["facts"]] == ["n1", "n2", "n3", "n4"]
    assert list((tmp_path / "runs").iterdir()) == []


HANG = """
import os
import time

from launcher.engine import schedule

derive_seed = schedule.derive_seed


def that_hangs_once(*numbers):
    if len(numbers) == 4 and numbers[1:3] == (7, 2) and os.environ["LAUNCH_ATTEMPT"] == "1":
        time.sleep(1000)
    return derive_seed(*numbers)


schedule.derive_seed = that_hangs_once
"""


def test_a_rank_that_hangs_is_found_in_time_with_the_stacks_of_all(launch, patched, undisturbed):
    timeout_s = 10
    launched = launch("train.epochs=2", f"train.hang_timeout_s={timeout_s}", patched(HANG))
    launched.wait_until(lambda: list(launched.run.attempt_errors(1).glob("rank-*.json")))
    found = launched.run.rank_error(1, 2)
    launched.wait_until(found.exists)
    error = json.loads(found.read_text())
    last = max(line["time"] for line in read_jsonl(launched.run.metrics) if line["attempt"] == 1)
    print(f"found {error['time'] - last:.0f} s after the last step; train.hang_timeout_s is {timeout_s}")
    assert timeout_s <= error["time"] - last
    code, output = launched.finish()
    assert code == 0, output
    assert ends(launched.run)[0] == (1, "hang")
    assert error["kind"] == "hang"
    assert not error["waiting"]
    assert "that_hangs_once" in error["traceback"]
    for rank in range(4):
        log = launched.run.rank_log(1, rank).read_text()
        assert "most recent call first" in log, rank
        assert json.loads(launched.run.rank_error(1, rank).read_text())["waiting"] == (rank != 2)
    assert weights(launched.run) == weights(undisturbed[0])
