"""Faults of whole nodes of a SLURM job, on a real cluster that this machine pretends: killed, cut off."""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl
from tests.faults import records
from tests.faults.bench import DEADLINE_S, Bench, Launched, NotHereError, Outcome, step
from tests.slurm.cluster import ClusterCommand

if TYPE_CHECKING:
    from collections.abc import Iterator

NODES = ("--nodes", "2:3", "--procs", "2", "--profile", "dev")
STEPS_PER_EPOCH = 4  # 93 images by 6 workers with 4 each: 24 a step
MODULES = ("launcher.backends.slurm.member", "submitit.core._submit")
"""What runs on each node of a job."""
GO_ON_S = 30
"""The nodes that are left train on within so many seconds of noticing."""
AT = 6
"""A step in the middle of the second epoch; faults come after it."""


@dataclass(kw_only=True)
class Job:
    """A run of three nodes or two, as a job."""

    cluster: ClusterCommand
    launched: Launched
    run: RunDir

    def until(self, condition, what: str) -> None:
        """Wait for something to happen to it."""
        self.launched.until(condition, what)

    def names(self) -> list[str]:
        """Machines that train now, the leader first."""
        attempt = max(event["attempt"] for event in events(self.run, "attempt_started"))
        found = [e for e in events(self.run, "attempt_started") if e["attempt"] == attempt]
        return [event["host"] for event in sorted(found, key=lambda event: event["node"])]

    def supervisor(self, host: str) -> psutil.Process:
        """That of a node."""
        found = self._processes(host)
        (top,) = [process for process in found if process.ppid() not in {other.pid for other in found}]
        return top

    def kill(self, host: str) -> float:
        """kill -9 of all that runs there for the run; return when."""
        self.until(lambda: self._processes(host), f"something runs on {host}")
        for process in self._processes(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return time.time()

    def _processes(self, host: str) -> list[psutil.Process]:
        """Supervisor and workers of a node."""
        found = []
        for program, pid in re.findall(
            rf"^  {host} +(\S+) \((\d+)\)$", self.cluster.run("status").stdout, re.MULTILINE
        ):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(int(pid))
                if program != "srun" and any(module in " ".join(process.cmdline()) for module in MODULES):
                    found.append(process)
        return found

    def next_step(self, since: float) -> float:
        """When the first step was taken by the workers that were started after a moment."""
        begun = min((e["attempt"] for e in events(self.run, "attempt_started") if e["time"] > since), default=None)
        lines = [line["time"] for line in read_jsonl(self.run.metrics) if begun and line["attempt"] >= begun]
        return min(lines, default=0.0)

    def goes_on(self, since: float) -> tuple[float, float]:
        """Wait until it trains on; return the seconds since a moment until it was noticed, and until the next step."""
        self.until(lambda: self.next_step(since), "it trains on")
        regrouped = [event for event in events(self.run, "regrouped") if event["time"] > since]
        noticed = regrouped[0]["time"] - regrouped[0]["seconds"] if regrouped else since
        return noticed - since, self.next_step(since) - since

    def is_whole_again(self, since: float) -> bool:
        """Whether three nodes train, after a moment."""
        made = [event for event in events(self.run, "regrouped") if event["time"] > since]
        return bool(made) and len(made[-1]["members"]) == 3 and self.next_step(made[-1]["time"]) > 0


@contextlib.contextmanager
def _cluster() -> Iterator[ClusterCommand]:
    """A cluster of its own.

    Raises:
        NotHereError: this machine cannot have one.
    """
    folder = Path("/tmp") / f"finetune-launcher-faults-{os.getpid()}"  # noqa: S108  a socket's path is short
    cluster = ClusterCommand(folder)
    tried = cluster.run("up", "--no-accounting")
    if tried.returncode:
        raise NotHereError(tried.stderr.strip().rpartition("\n")[2].removeprefix("cluster: "))
    try:
        yield cluster
    finally:
        cluster.down()


@contextlib.contextmanager
def _job(bench: Bench, name: str, *changes: str, nodes: tuple[str, ...] = NODES, at: int = AT) -> Iterator[Job]:
    """A job that is well under way."""
    with _cluster() as cluster:
        run = RunDir(bench.place(name) / "run")
        environment = {"SLURM_CONF": str(cluster.folder / "slurm.conf")}
        launched = bench.launch(run.path, *nodes, *changes, env=environment)
        job = Job(cluster=cluster, launched=launched, run=run)
        job.until(lambda: step(run) >= at and run.last_checkpoint.exists(), f"step {at}")
        yield job


def _soon(bench: Bench, seconds: float) -> None:
    """Assert that the others went on in time; not in the suite, where other tests take theirs."""
    assert bench.is_warm or seconds < GO_ON_S, f"{seconds:.0f} s after it was noticed"


def _ends(job: Job, bench: Bench, epochs: int) -> int:
    """See it to its end: one job, each step the samples of the undisturbed run; return the steps lost."""
    job.launched.ends(0)
    assert len(events(job.run, "submitted")) == 1
    assert not list(events(job.run, "start_failed"))
    restarts = job.cluster.slurm("scontrol", "show", "job", events(job.run, "submitted")[0]["job_id"])
    assert "Restarts=0" in restarts, restarts
    return _same_samples(job.run, bench, epochs)


def _same_samples(run: RunDir, bench: Bench, epochs: int) -> int:
    """Assert that each step has the samples of the undisturbed run; which they are follows from their positions."""
    undisturbed = records.every_sample_once(bench.undisturbed("train.epochs=2", "launch.procs=6"), epochs=2)
    found = records.every_sample_once(run, epochs=epochs)
    places = [(line["offset"], line["samples"]) for line in undisturbed.train if line["epoch"] == 0]
    for epoch in range(epochs):
        assert [(line["offset"], line["samples"]) for line in found.train if line["epoch"] == epoch] == places, epoch
    return sum(found.lost)


def supervisor(bench: Bench) -> Outcome:
    epochs = 12
    with _job(bench, "elastic-supervisor", f"train.epochs={epochs}") as job:
        leader, *_, last = job.names()
        spoken = []
        for host in (last, leader):  # the one that leads is where the others meet
            job.supervisor(host).kill()
            since = time.time()
            noticed, seconds = job.goes_on(since)
            _soon(bench, seconds - noticed)
            spoken.append(f"{seconds:.0f} s")
            job.until(lambda since=since: job.is_whole_again(since), "it is taken in again")
        lost = _ends(job, bench, epochs)
    return Outcome(
        happened=f"the other two trained on {' and '.join(spoken)} after it (a plain node, then the first), in the "
        "same job; started again and taken in; the samples of every step as undisturbed",
        steps_lost=lost,
    )


def cut(bench: Bench) -> Outcome:
    epochs = 14
    with _job(bench, "elastic-cut", f"train.epochs={epochs}") as job:
        _wait_long_for_nodes(job.cluster)
        *_, host = job.names()
        since = time.time()
        assert job.cluster.run("cut", host).returncode == 0
        noticed, seconds = job.goes_on(since)
        _soon(bench, seconds - noticed)
        healed = time.time()
        assert job.cluster.run("heal", host).returncode == 0
        job.until(lambda: job.is_whole_again(healed), "the node is taken in again")
        again = time.time() - healed
        lost = _ends(job, bench, epochs)
    return Outcome(
        happened=f"noticed after {noticed:.0f} s; the other two trained on {seconds - noticed:.0f} s later in the same "
        f"job; given back, it trained with them after {again:.0f} s; the samples of every step as undisturbed",
        steps_lost=lost,
    )


def _wait_long_for_nodes(cluster: ClusterCommand) -> None:
    """Have SLURM wait for a silent node as long as it does by default; the cluster's 15 s are for impatient tests."""
    file = cluster.folder / "slurm.conf"
    file.write_text(file.read_text().replace("SlurmdTimeout=15", "SlurmdTimeout=300"))
    cluster.slurm("scontrol", "reconfigure")


def first(bench: Bench) -> Outcome:
    """The node of the batch script, for good: SLURM takes it out of the job, which has no script then."""
    epochs = 8
    nodes = ("--nodes", "2:3", "--spares", "1", *NODES[2:])
    with _job(bench, "elastic-first", f"train.epochs={epochs}", nodes=nodes) as job:
        host = job.names()[0]
        since = time.time()
        assert job.cluster.run("cut", host).returncode == 0
        noticed, seconds = job.goes_on(since)
        _soon(bench, seconds - noticed)
        job.until(lambda: job.is_whole_again(since), "the spare node takes its place")
        whole = time.time() - since
        assert host not in job.names()
        lost = _ends(job, bench, epochs)
    return Outcome(
        happened=f"noticed after {noticed:.0f} s; the other two trained on {seconds - noticed:.0f} s later, with the "
        f"spare one after {whole:.0f} s, in the same job, and ended it; the samples of every step as undisturbed",
        steps_lost=lost,
    )


def requeued(bench: Bench) -> Outcome:
    epochs = 6
    with _job(bench, "whole-supervisor", f"train.epochs={epochs}", nodes=("--nodes", "3", *NODES[2:])) as job:
        *_, host = job.names()
        job.supervisor(host).kill()
        since = time.time()
        job.until(lambda: job.next_step(since), "it trains again")
        seconds = job.next_step(since) - since
        job.launched.ends(0)
        lost = _same_samples(job.run, bench, epochs)
    return Outcome(
        happened=f"trained on {seconds:.0f} s after it, in a start of the job without that node", steps_lost=lost
    )


def at_random_moments(bench: Bench) -> Outcome:
    kills = max(3, bench.kills // 5)
    epochs = 8 + 3 * kills  # so that the last one does not come when all is trained
    chance = random.Random(bench.seed)  # noqa: S311  no secret
    with _job(bench, "elastic-kills", f"train.epochs={epochs}") as job:
        for number in range(kills):
            host = chance.choice(job.names())
            since = job.kill(host)
            job.goes_on(since)
            deadline = time.monotonic() + DEADLINE_S
            wanted = step(job.run) + chance.randint(1, 2 * STEPS_PER_EPOCH)
            while step(job.run) < wanted and time.monotonic() < deadline:
                assert job.launched.process.poll() is None, f"over after {number + 1} kills: {job.launched.output}"
                time.sleep(0.05)
        lost = _ends(job, bench, epochs)
        attempts = len({event["attempt"] for event in events(job.run, "attempt_started")})
    return Outcome(
        happened=f"{kills} kills of all of a node's processes (seed {bench.seed}), {attempts} attempts at "
        f"{epochs * STEPS_PER_EPOCH} steps, one job: the samples of every step as undisturbed",
        steps_lost=lost,
    )
