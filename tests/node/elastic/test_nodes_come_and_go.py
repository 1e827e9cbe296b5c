"""Nodes that are killed, stand still, are cut off and come back, on real runs by hand: one worker each, over gloo."""

from __future__ import annotations

import os
import signal
import time

import pytest

from launcher.engine.schedule import Batching, Schedule
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.system import network
from launcher.system.files import read_jsonl
from tests.faults import records
from tests.faults.bench import NUM_TRAIN, Bench, step, written

BATCH, NODES = 2, 3
SLOW = """
import time


class Slow:
    def step(self, step):
        time.sleep(0.12)
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(folder=tmp_path_factory.mktemp("elastic"))
    (made.folder / "slow.py").write_text(SLOW)
    yield made
    made.close()


class Nodes:
    """`launch` on some nodes of one run, each with the same command."""

    def __init__(self, bench, name, nodes, *changes, endpoint=None, enter=lambda _rank: ()):
        self.run = RunDir(bench.place(name) / "run")
        self._bench, self._enter = bench, enter
        slow = f'train.listeners=[{{listener: "{bench.folder / "slow.py"}:Slow"}}]'
        endpoint = endpoint or f"127.0.0.1:{network.free_port(os.getpid())}"
        self._arguments = (f"batch.size={BATCH}", slow, *changes, "--nodes", nodes, "--procs", "1")
        self._arguments += ("--rdzv-endpoint", endpoint, "--backend", "torchrun")
        self.at = {}

    def start(self, *ranks):
        for rank in ranks:
            self.at[rank] = self._bench.launch(self.run.path, *self._arguments, "--node-rank", str(rank))

    def regrouped(self, *members, after=0.0):
        """Wait until just these nodes train, and have taken a step; the event."""
        found = []

        def have():
            found[:] = [e for e in events(self.run, "regrouped") if e["time"] > after and e["members"] == list(members)]
            return found and any(line["attempt"] >= found[0]["attempt"] for line in self.lines())

        next(self.at[one] for one in members).until(have, f"nodes {members} go on")
        return found[0]

    def lines(self):
        return [line for line in read_jsonl(self.run.metrics) if line["split"] == "train"]

    def first_step_of(self, attempt):
        return min(line["time"] for line in self.lines() if line["attempt"] >= attempt)


def samples(*, size, epochs):
    """Step, epoch and end of each step's samples in the epoch's order, as it is where nothing happens."""
    batching = Batching.even(BATCH, world_size=size, global_size=None, accumulate=1)
    schedule = Schedule(seed=0, num_samples=NUM_TRAIN, batching=batching)
    steps = schedule.steps(0, epoch=0, offset=0, end_epoch=epochs)
    return [(number, one.epoch, one.end, one.num_samples) for number, one in enumerate(steps, 1)]


@pytest.mark.slow
def test_nodes_are_killed_and_stand_still_and_every_step_has_the_samples_of_an_undisturbed_run(bench):
    epochs = 16
    nodes = Nodes(bench, "come-and-go", "2:3", f"train.epochs={epochs}")
    run = nodes.run
    nodes.start(0, 1, 2)
    nodes.at[1].until(lambda: step(run) >= 20 and written(run), "step 20")

    killed = time.time()
    nodes.at[0].signal(signal.SIGKILL)  # the one that all others meet at, and its worker
    seen = nodes.regrouped(1, 2, after=killed)
    first = nodes.first_step_of(seen["attempt"])
    print(f"node 0 killed: {seen['seconds']} s from notice to decision, {first - killed:.1f} s to the next step")
    assert first - killed < 45
    nodes.start(0)
    nodes.regrouped(1, 2, 0, after=killed)

    still = time.time()
    nodes.at[1].signal(signal.SIGSTOP)
    seen = nodes.regrouped(2, 0, after=still)
    print(f"node 1 stopped: {nodes.first_step_of(seen['attempt']) - still:.1f} s to the next step")
    nodes.at[1].signal(signal.SIGCONT)
    nodes.regrouped(2, 0, 1, after=still)

    for node in nodes.at.values():
        node.ends(0)
    assert "waits to be taken in" in nodes.at[1].output
    assert run.read_status()["state"] == "completed"
    record = records.every_sample_once(run, epochs=epochs)
    records.nothing_written_is_lost(run)
    found = [(line["step"], line["epoch"], line["offset"], line["samples"]) for line in record.train]
    assert found == samples(size=NODES, epochs=epochs)
    lost = [(event["node"], event["generation"]) for event in events(run, "node_lost")]
    assert lost == [(0, 1), (1, 3)]
    assert [event["node"] for event in events(run, "node_joined")] == [0, 1]
