"""What tracks a run lives on where nodes are lost, and the next leader begins to track where the first one is gone."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.faults.bench import ROOT
from tests.tracking.hand_made import ENDED_S, make_run, steps_of, train

ONE_NODE = """
    import subprocess, sys
    from launcher.node import supervisor
    from launcher.node.elastic.course import Course
    from launcher.node.signals import StopSignals
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.runs.generations import Generations
    from launcher.runs.run_dir import RunDir
    from launcher.system import processes
    from tests.tracking.hand_made import finish, train, wait_until

    processes.adopt_orphans()
    run, node = RunDir(sys.argv[1]), int(sys.argv[2])
    plan = LaunchPlan(run_id="run", nodes=2, min_nodes=1, node_rank=node, address="127.0.0.1")
    stop = StopSignals(run, node_rank=node, outlives_loss=True)
    with supervisor._tracked(run, plan, stop) as trackers:
        course = Course(run, plan, stop, Generations(run, "start"), range(2), trackers.pids)
        if node:
            supervisor._track_as_leader(run, plan, trackers)
        wait_until(lambda: list(run.wandb.glob("offline-run-*")))
        worker = subprocess.Popen(["sleep", "100"])
        stop.request(reason="node 1 is gone", cause="lost_node")
        before = trackers.pids()
        assert course.goes_on()
        assert not processes.descendants(worker.pid) and not processes.start_time(worker.pid)
        assert trackers.pids() == before and trackers.alive
        supervisor._track_as_leader(run, plan, trackers)
        train(run, 2)
        finish(run)
        trackers.finish(100)
        assert trackers.codes == [0]
"""


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_tracking_goes_on_where_a_node_is_lost_and_where_the_first_one_is(node, tmp_path):
    run = make_run(tmp_path)
    train(run, 1)
    command = [sys.executable, "-c", textwrap.dedent(ONE_NODE), str(run), str(node)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=ENDED_S, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "sending the rest" not in line]
    assert said == (["wandb: node 1 goes on with it"] if node else [])
    assert steps_of(run) == [1, 2]
