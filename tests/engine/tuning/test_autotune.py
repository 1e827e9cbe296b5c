"""batch.size: auto on real ranks: probes in children, memory limits that the kernel enforces, agreement over gloo."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

from launcher.engine.device import Device
from launcher.engine.distributed import Ranks
from launcher.engine.loading.data_sets import open_data_sets
from launcher.engine.schedule import Batching
from launcher.engine.setup import build_parts
from launcher.engine.tuning import probe
from launcher.engine.tuning.autotune import StoppedError, agree, tune_rank
from launcher.engine.tuning.child import OutOfMemoryError, call_in_child
from launcher.errors import TrainingError, UsageError
from launcher.recipe.load import read_resolved
from launcher.system import memory as host_memory
from launcher.system.memory import FreeMemory
from tests import warm
from tests.cgroups import MemoryGroup
from tests.nets import FACTORY, Plain

ROOT = Path(__file__).parents[3]
GB = 10**9
TINY = (FACTORY, "data.image_size=32")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tune(engine, monkeypatch):
    """What one rank finds with 8 GB, of a data set without steps enough for large batches unless they are allowed.

    What is free in truth changes with the tests beside these.
    """
    monkeypatch.setattr(host_memory, "free", lambda: FreeMemory(num_bytes=8 * GB, limit="the machine's memory"))

    def call(run, ranks=None, *, device=engine.cpu, fresh=False, stop=engine.never, say=lambda _: None):
        recipe, data_sets = read_resolved(run.recipe), open_data_sets(run)
        return tune_rank(run, recipe, ranks or Ranks(), device, data_sets, fresh=fresh, stop=stop, say=say)

    return call


def events(run, kind):
    return [e for line in run.events.read_text().splitlines() if (e := json.loads(line))["kind"] == kind]


AUTO = {"batch": {"size": "auto", "global_size": 16}}


@pytest.mark.slow
def test_what_a_rank_finds_was_measured_and_fits(make_run, tune):
    run, said = make_run(**AUTO), []
    found = tune(run, say=said.append)
    assert found["from"] == "probes"
    assert [row["batch_size"] for row in found["attempts"]][:2] == [8, 16]
    assert found["batch_size"] in (8, 16)
    assert found["needed_bytes"] <= found["budget_bytes"] <= found["free_bytes"]
    assert found["images_per_s"] > 0
    assert len([line for line in said if line.startswith("batch ") and "batch size" not in line]) == len(
        found["attempts"]
    )  # others: two in turn
    assert tune(run)["from"] == "cache"
    assert tune(run, fresh=True)["from"] == "probes"
    assert tune(make_run("other", **AUTO, model={"arch": "mobilenet_v3_small"}))["from"] == "probes"


@pytest.mark.slow
def test_where_nothing_fits_the_error_says_how_much_is_needed_and_what_limits_it(make_run, tune, monkeypatch):
    free = host_memory.status_bytes("RssAnon") + GB // 50
    monkeypatch.setattr(host_memory, "free", lambda: FreeMemory(num_bytes=free, limit="the job's --mem"))
    found = tune(make_run(**AUTO))
    assert "not even a batch of 1 image fits: needed 0." in found["error"]
    assert "free to take 0.0" in found["error"]
    assert "GB (the job's --mem)" in found["error"]
    assert "data.image_size" in found["error"]


class Untouched(Device):
    """A GPU to the rank, which may ask it nothing: CUDA cannot be used in a fork of a process that has used it.

    In its children it is the CPU.
    """

    @property
    def is_cuda(self):
        return multiprocessing.current_process().name != "probe"

    def __getattribute__(self, name):
        if name in ("name", "precision", "activate", "total_memory", "free_memory", "measure_memory"):
            assert not self.is_cuda, f"the rank asks its GPU for {name}, and goes on to fork"
        return super().__getattribute__(name)


@pytest.mark.slow
def test_a_rank_touches_its_gpu_in_children_only(make_run, tune):
    recipe = AUTO | {"precision": "auto", "data": {"workers": "auto"}}
    assert tune(make_run(**recipe), device=Untouched(type="cpu"))["from"] == "probes"


def test_a_stop_ends_the_probes(make_run, tune, engine):
    assert tune(make_run(**AUTO), stop=engine.at_poll(2)).get("stopped")


def test_what_fails_in_a_probe_is_told_with_its_traceback(make_run, tune, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(probe, "measure", fail)
    found = tune(make_run(**AUTO))
    assert found["kind"] == "training"
    assert "ZeroDivisionError" in found["error"]


def test_a_probe_whose_memory_runs_out_does_not_go_on_with_halves(make_run, engine, monkeypatch):
    def fail_above_4(self, images):
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        return forward(self, images)

    forward = Plain.forward
    monkeypatch.setattr(Plain, "forward", fail_above_4)
    run = make_run(**AUTO)
    call = functools.partial(probe.measure, run, engine.cpu, open_data_sets(run))
    assert call_in_child(functools.partial(call, 4), timeout_s=60, heed_stop=lambda: None).batch_size == 4
    with pytest.raises(OutOfMemoryError, match="a batch of 5"):
        call_in_child(functools.partial(call, 5), timeout_s=60, heed_stop=lambda: None)


# Agreement


def found_by(rank, *, speed=100.0, size=32, largest=64, device="GPU"):
    known = {"rank": rank, "host": f"n{rank}", "device": device, "total_bytes": 80 * GB, "from": "probes"}
    return known | {"batch_size": size, "max_size": largest, "images_per_s": speed, "workers": 1, "threads": 1}


def agreed(in_ranks, run, *found):
    recipe = read_resolved(run.recipe)

    def rank(who):
        try:
            return agree(run, recipe, who, found[who.rank], print)
        except (UsageError, TrainingError, StoppedError) as error:
            return f"{type(error).__name__}: {error}"

    return in_ranks(len(found), rank)


@pytest.mark.slow
def test_all_ranks_decide_the_same_and_it_is_kept_in_the_run(make_run, in_ranks):
    run = make_run(batch={"size": "auto"})
    first = agreed(in_ranks, run, found_by(0), found_by(1, speed=50.0, device="slow"), found_by(2))
    expected = Batching(batch_sizes=(64, 32, 64), shares=(64, 32, 64), global_batch_size=160)
    assert first == [expected] * 3
    (event,) = events(run, "tuned")
    assert (event["batch_sizes"], event["global_batch_size"]) == ([64, 32, 64], 160)
    kept = [one | {"from": "run"} for one in json.loads(run.tuning.read_text())["ranks"]]
    kept[0]["images_per_s"] = 1.0  # not looked at any more
    assert agreed(in_ranks, run, *kept) == [expected] * 3
    assert len(events(run, "tuned")) == 1


@pytest.mark.slow
def test_what_one_rank_cannot_all_learn(make_run, in_ranks):
    run = make_run(batch={"size": "auto"})
    broken = {"rank": 1, "host": "n1", "error": "nothing fits", "kind": "usage"}
    assert agreed(in_ranks, run, found_by(0), broken) == ["UsageError: rank 1 on n1: nothing fits"] * 2
    assert agreed(in_ranks, run, {"rank": 0, "host": "n0", "stopped": True}, found_by(1)) == ["StoppedError: "] * 2
    assert not run.tuning.exists()


@pytest.mark.slow
def test_a_run_that_goes_on_measures_only_where_the_device_is_another(make_run, tune, in_ranks):
    run = make_run(**AUTO)
    found = tune(run)
    agreed(in_ranks, run, found)
    kept = tune(run)
    assert (kept["from"], kept["batch_size"], kept["attempts"]) == ("run", found["batch_size"], found["attempts"])
    content = json.loads(run.tuning.read_text())
    content["ranks"][0]["device"] = "another"
    run.tuning.write_text(json.dumps(content))
    assert tune(run)["from"] == "cache"


def test_shares_reach_the_schedule(make_run, engine):
    run = make_run(**AUTO)
    batching = Batching(batch_sizes=(4, 2), shares=(3, 1), global_batch_size=16)
    parts = build_parts(run, Ranks(world_size=2), engine.cpu, batching=batching, loader_workers=0)
    (step, *_) = parts.schedule.steps(0, epoch=0, offset=0, end_epoch=1)
    assert [len(batch) for batch in step.micro_batches] == [4, 4, 4]


# Whole runs, from the command line


def launch(*arguments, group=None):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if group:
        return group.run([sys.executable, "-m", "launcher", *arguments], env=env, capture_output=True)
    return warm.launch(arguments, cwd=ROOT, env=env)


@pytest.fixture
def recipe(tmp_path, photos):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"""
name: tuned
model: {{arch: mobilenet_v3_small, weights: null}}
data: {{path: {photos}, image_size: 64, augment: none}}
batch: {{size: auto, global_size: 24}}
precision: fp32
train: {{epochs: 2, early_stopping: {{patience: null}}}}
tracking: {{wandb: {{mode: disabled}}}}
post: {{enabled: false}}
launch: {{device: cpu, procs: 2}}
"""
    )
    return file


@pytest.mark.slow
def test_a_run_tunes_itself_trains_and_goes_on_with_the_same_sizes(recipe, tmp_path):
    path = tmp_path / "run"
    done = launch(recipe, *TINY, "train.epochs=1", "--run-dir", path)
    assert done.returncode == 0, done.stderr
    first = json.loads((path / "tuning.json").read_text())
    assert first["batching"]["global_batch_size"] == 24
    assert [rank["from"] for rank in first["ranks"]] == ["probes"] * 2
    done = launch(recipe, *TINY, "train.epochs=2", "--run-dir", path, "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads((path / "tuning.json").read_text()) == first
    kinds = [json.loads(line)["kind"] for line in (path / "events.jsonl").read_text().splitlines()]
    assert kinds.count("tuned") == 1
    assert "Batch sizes" in (path / "report.html").read_text()


@pytest.mark.slow
def test_launch_tune_prints_what_it_measured_and_leaves_nothing(recipe, tmp_path):
    done = launch("tune", recipe, *TINY, "--json", "--procs", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [rank["rank"] for rank in found["ranks"]] == [0]
    assert found["ranks"][0]["attempts"][0]["batch_size"] == 8
    assert "batch 8: " in done.stderr
    shown = launch("tune", recipe, *TINY, "--procs", "1")
    assert "to fix it: batch.size=" in shown.stdout
    assert list(tmp_path.glob("run*")) == []


@pytest.fixture
def group(request):
    try:
        made = MemoryGroup(f"test-{os.getpid()}", request.param)
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    with made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("group", [int(1.0 * GB)], indirect=True)
def test_a_worker_that_the_kernel_kills_starts_again_with_half_the_batch(recipe, tmp_path, group):
    path = tmp_path / "run"
    large = (
        "data.image_size=160",
        "batch.size=37",
        "batch.global_size=null",
        "train.epochs=2",
        "launch.max_restarts=3",
    )
    done = launch(str(recipe), *large, "--procs", "1", "--run-dir", str(path), group=group)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    kills = [event for event in found if event["kind"] == "memory_kill"]
    assert kills, "the limit is too high for this test"
    assert [e["cause"] for e in found if e["kind"] == "attempt_ended"] == ["memory_kill"] * len(kills)
    halved = [event["batch_sizes"] for event in found if event["kind"] == "out_of_memory"]
    assert halved == [{"0": [37, 37 >> kill]} for kill in range(1, len(kills) + 1)]
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "val"] == [1, 2]  # steps are of 37 images as before
    assert str(halved[-1]["0"][1]) in (path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("group", [int(1.2 * GB)], indirect=True)
def test_under_a_limit_that_the_kernel_enforces_it_finds_a_batch_that_trains(recipe, tmp_path, group):
    path = tmp_path / "run"
    large = ("data.image_size=160", "batch.objective=memory", "batch.global_size=37", "train.epochs=8")
    done = launch(str(recipe), *large, "--procs", "1", "--run-dir", str(path), group=group)
    assert done.returncode == 0, done.stderr
    (rank,) = json.loads((path / "tuning.json").read_text())["ranks"]
    assert rank["limit"].startswith("the control group ")
    assert rank["needed_bytes"] <= rank["budget_bytes"] < 1.2 * GB
    assert rank["batch_size"] < 37, "the limit is too high for this test"
    kinds = [json.loads(line)["kind"] for line in (path / "events.jsonl").read_text().splitlines()]
    assert kinds.count("attempt_started") == 1
