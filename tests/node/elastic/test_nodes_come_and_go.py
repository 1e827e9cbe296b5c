"""Nodes that are killed, stand still, are cut off and come back, on real runs by hand: one worker each, over gloo."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest

from launcher.engine.schedule import Batching, Schedule
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl
from tests import ports
from tests.faults import records
from tests.faults.bench import NUM_TRAIN, Bench, state_of, step, written
from tests.nets import FACTORY

BATCH, NODES = 2, 3
SLOW = """
import time


class Slow:
    def step(self, step):
        time.sleep(0.2)
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(folder=tmp_path_factory.mktemp("elastic"), is_warm=True)
    (made.folder / "slow.py").write_text(SLOW)
    yield made
    made.close()


class Nodes:
    """`launch` on some nodes of one run, each with the same command."""

    def __init__(self, bench, name, nodes, *changes, endpoint=None, enter=lambda _rank: ()):
        self.run = RunDir(bench.place(name) / "run")
        self._bench, self._enter = bench, enter
        slow = f'train.listeners=[{{listener: "{bench.folder / "slow.py"}:Slow"}}]'
        self.endpoint = endpoint = endpoint or f"127.0.0.1:{ports.free()}"
        self._arguments = (FACTORY, f"batch.size={BATCH}", slow, *changes, "--nodes", nodes, "--procs", "1")
        self._arguments += ("--rdzv-endpoint", endpoint, "--backend", "torchrun")
        self.at = {}

    def start(self, *ranks):
        for rank in ranks:
            arguments = (*self._arguments, "--node-rank", str(rank))
            self.at[rank] = self._bench.launch(self.run.path, *arguments, enter=self._enter(rank))

    def resume(self, *ranks):
        for rank in ranks:
            arguments = ("--node-rank", str(rank), "--rdzv-endpoint", self.endpoint)
            self.at[rank] = self._bench.resume(self.run.path, *arguments)

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


def came_to_its_end(run, *, size, epochs):
    """Assert that it is complete, and that each step had the samples that it has where nothing happens."""
    assert run.read_status()["state"] == "completed"
    record = records.every_sample_once(run, epochs=epochs)
    records.nothing_written_is_lost(run)
    found = [(line["step"], line["epoch"], line["offset"], line["samples"]) for line in record.train]
    assert found == samples(size=size, epochs=epochs)


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
    came_to_its_end(run, size=NODES, epochs=epochs)
    lost = [(event["node"], event["generation"]) for event in events(run, "node_lost")]
    assert lost == [(0, 1), (1, 3)]
    assert [event["node"] for event in events(run, "node_joined")] == [0, 1]


ADDRESSES = ("198.19.251.1", "198.19.251.2")


@pytest.fixture
def cable():
    """Two machines (network namespaces) that are joined by a cable; what enters one, and what cuts the cable."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"ftl-elastic-{os.getpid()}-{rank}" for rank in range(2)]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    def put(state):
        ip("-n", names[1], "link", "set", "eth0", state)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "address", "add", f"{ADDRESSES[rank]}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")
        yield lambda rank: ("nsenter", f"--net=/run/netns/{names[rank]}"), put
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
def test_a_network_that_falls_in_two_leaves_one_part_which_takes_the_other_in_when_it_is_whole(bench, cable):
    """Either side could go on alone; both see the run directory all the while."""
    epochs, (enter, put) = 5, cable
    endpoint = f"{ADDRESSES[0]}:29400"
    nodes = Nodes(bench, "cable", "1:2", f"train.epochs={epochs}", endpoint=endpoint, enter=enter)
    run = nodes.run
    nodes.start(0, 1)
    nodes.at[1].until(lambda: step(run) >= 20 and written(run), "step 20")
    cut = time.time()
    put("down")
    seen = nodes.regrouped(0, after=cut)
    print(f"cable cut: {nodes.first_step_of(seen['attempt']) - cut:.1f} s to the next step")
    nodes.at[1].until(lambda: "the others went on without this node" in nodes.at[1].output, "finds itself left out")
    put("up")
    nodes.regrouped(0, 1, after=cut)
    for node in nodes.at.values():
        node.ends(0)
    came_to_its_end(run, size=2, epochs=epochs)
    assert [event["members"] for event in events(run, "regrouped")] == [[0], [0, 1]]


@pytest.mark.slow
def test_a_killed_launcher_costs_no_step_and_the_run_is_cancelled_and_resumed(bench):
    epochs = 8
    nodes = Nodes(bench, "launcher", "2:3", f"train.epochs={epochs}")
    run = nodes.run
    nodes.start(0, 1, 2)
    nodes.at[1].until(lambda: step(run) >= 20 and written(run), "step 20")
    killed = time.time()
    nodes.at[0].process.kill()  # its worker lives, tells the others to stop, and saves with them
    seen = nodes.regrouped(1, 2, after=killed)
    print(f"launcher killed: {nodes.first_step_of(seen['attempt']) - killed:.1f} s to the next step")
    nodes.resume(0)
    nodes.regrouped(1, 2, 0, after=killed)
    assert "cancelled; go on with: launch resume" in bench.ask("cancel", str(run.path))
    outputs = [nodes.at[rank].ends(75) for rank in (0, 1, 2)]
    assert all("launch resume" in output for output in outputs)
    assert run.read_status()["state"] == "cancelled"
    assert sum(records.read(run).lost) == 0
    assert state_of(run)["step"] == max(line["step"] for line in nodes.lines())
    nodes.resume(2, 1)  # before node 0: what lies there from the last time is not for them
    time.sleep(3)
    nodes.resume(0)
    for node in nodes.at.values():
        node.ends(0)
    came_to_its_end(run, size=3, epochs=epochs)


@pytest.mark.slow
def test_ctrl_c_on_one_node_ends_all_of_a_smaller_run_with_a_checkpoint(bench):
    nodes = Nodes(bench, "ctrl-c", "1:3", "train.epochs=30")
    run = nodes.run
    nodes.start(0, 1)  # the third never comes
    nodes.at[1].until(lambda: step(run) >= 5, "step 5")
    assert run.read_status()["nodes"] == 2
    nodes.at[1].signal(signal.SIGINT)
    outputs = [nodes.at[rank].ends(75) for rank in (0, 1)]
    assert all("stopped by SIGINT" in output for output in outputs)
    assert run.read_status()["state"] == "preempted"
    assert state_of(run)["batching"]["global_batch_size"] == BATCH * NODES
    assert state_of(run)["step"] == max(line["step"] for line in nodes.lines())
