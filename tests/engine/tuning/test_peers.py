"""Ranks that measure for each other: real processes that meet in a store; what they measure is made up."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import time
from dataclasses import dataclass, replace

import pytest
import torch.distributed as dist

from launcher.engine.device import Device
from launcher.engine.loading.data_sets import open_data_sets
from launcher.engine.numerics import Preference
from launcher.engine.tuning import autotune, probe, rank_probes
from launcher.engine.tuning.autotune import StoppedError, agree, tune_rank
from launcher.engine.tuning.child import TooSlowError
from launcher.engine.tuning.peers import Introduction, measurer
from launcher.engine.tuning.probe import Probe
from launcher.engine.tuning.rank_probes import RankProbes
from launcher.errors import TrainingError
from launcher.recipe.load import read_resolved
from launcher.runs.run_dir import ATTEMPT_VARIABLE
from launcher.system import memory as host_memory
from launcher.system.memory import FreeMemory
from tests import ports

GB = 10**9


def introduction(rank, free_gb=78.0, *, device="A100", node_rank=0, cores=8, own_device=True):
    who = Preference(rank=rank, host=f"n{node_rank}", device=device, precision="bf16", channels_last=True)
    return Introduction(
        preference=who,
        node_rank=node_rank,
        total_bytes=80 * GB,
        free_bytes=int(free_gb * GB),
        cores=cores,
        own_device=own_device,
    )


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([{}, {}, {}], [0, 0, 0]),
        ([{"node_rank": 0}, {"node_rank": 0}, {"node_rank": 1}, {"node_rank": 1}], [0, 0, 2, 2]),
        ([{"device": "A100"}, {"device": "V100"}, {"device": "A100"}, {"device": "V100"}], [0, 1, 0, 1]),
        ([{"cores": 8}, {"cores": 7}], [0, 1]),
        ([{"free_gb": 78}, {"free_gb": 77}, {"free_gb": 78}], [1, 1, 1]),  # what fits there fits on all
        ([{"free_gb": 40}, {"free_gb": 78}, {"free_gb": 78}], [0, 1, 1]),  # the first one drives a screen
        ([{"free_gb": 70}, {"free_gb": 73}, {"free_gb": 76}], [0, 0, 2]),
        ([{"own_device": False}, {"own_device": False}], [0, 1]),
    ],
    ids=str,
)
def test_of_equal_gpus_of_a_node_one_is_measured(others, expected):
    everyone = [introduction(rank, **one) for rank, one in enumerate(others)]
    assert [measurer(everyone, rank) for rank in range(len(everyone))] == expected


@dataclass(frozen=True, kw_only=True)
class Gpu(Device):
    """A GPU to the rank, the CPU in its children."""

    auto: str = "fp32"

    @property
    def is_cuda(self):
        return multiprocessing.current_process().name != "probe"

    def free_memory(self, local_world_size):
        return FreeMemory(num_bytes=2 * GB, limit="free on cuda:0")

    def precision(self, wanted):
        return self.auto if wanted == "auto" else wanted


@pytest.fixture
def meet(make_run, in_ranks, monkeypatch, tmp_path):
    """What ``num`` ranks say, each of which calls ``measure(rank, batch_size)``; and who measured what, in order."""
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))
    run = make_run(batch={"size": "auto", "global_size": 16}, precision="auto")
    recipe, data_sets = read_resolved(run.recipe), open_data_sets(run)
    log = tmp_path / "measured.jsonl"
    port = str(ports.free())

    def call(num, measure, *, devices=None, stop=lambda rank: False, then=lambda who, own: own):
        def made_up(run, device, data_sets, batch_size, *, beside=None, numerics=None, budget=None):
            rank = int(os.environ["RANK"])
            with log.open("a") as file:
                file.write(json.dumps([rank, batch_size, numerics.precision]) + "\n")
            measure(rank, batch_size)
            return Probe(batch_size=batch_size, images_per_s=100.0, memory_bytes=GB // 10, state_bytes=1)

        def compared(run, device, data_sets, batch_sizes, *, numerics=None):
            return [
                Probe(batch_size=size, images_per_s=100.0, memory_bytes=GB // 10, state_bytes=1) for size in batch_sizes
            ]

        def rank(who):
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, ATTEMPT_VARIABLE: "1"}
            os.environ |= {"RANK": str(who.rank), "WORLD_SIZE": str(num)}
            own = tune_rank(
                run,
                recipe,
                who,
                devices[who.rank] if devices else Gpu(type="cpu"),
                data_sets,
                fresh=True,
                stop=lambda: stop(who.rank),
                say=lambda line: None,
            )
            dist.barrier()  # rank 0 serves the store here, as the agent does else
            return then(who, own)

        monkeypatch.setattr(probe, "measure", made_up)
        monkeypatch.setattr(probe, "compare", compared)
        log.write_text("")
        found = in_ranks(num, rank)
        return found, [tuple(json.loads(line)) for line in log.read_text().splitlines()]

    call.run, call.recipe = run, recipe
    return call


@pytest.mark.slow
def test_equal_gpus_share_one_search_in_the_precision_that_all_have(meet):
    devices = [Gpu(type="cpu", auto=auto) for auto in ("bf16", "fp16", "bf16")]
    found, measured = meet(3, lambda rank, size: None, devices=devices)
    assert measured == [(0, 8, "fp16"), (0, 16, "fp16")]
    assert [(one["rank"], one["from"]) for one in found] == [(0, "probes"), (1, "peer"), (2, "peer")]
    assert len({(one["batch_size"], one["max_size"], one["images_per_s"]) for one in found}) == 1


@pytest.mark.slow
def test_ranks_on_the_cpu_measure_at_the_same_time_since_they_share_it(meet, engine):
    found, measured = meet(2, lambda rank, size: None, devices=[engine.cpu] * 2)
    assert sorted((rank, size) for rank, size, _ in measured) == [(0, 8), (0, 16), (1, 8), (1, 16)]
    assert [one["from"] for one in found] == ["probes"] * 2


@pytest.mark.slow
def test_where_the_one_that_measures_fails_all_end_with_its_error_told_once(meet):
    def fail(rank, size):
        raise ZeroDivisionError(f"of rank {rank}")

    def then(who, own):
        with pytest.raises(TrainingError) as error:
            agree(meet.run, meet.recipe, who, own, print)
        return str(error.value)

    found, measured = meet(2, fail, then=then)
    assert [rank for rank, *_ in measured] == [0]
    assert found[0] == found[1]
    assert found[0].startswith("rank 0 on ")
    assert found[0].count("ZeroDivisionError: of rank 0") == 1


@dataclass(frozen=True, kw_only=True)
class Broken(Gpu):
    """A GPU that cannot be asked anything."""

    def activate(self):
        raise RuntimeError("no CUDA-capable device is detected")


@pytest.mark.slow
def test_where_one_cannot_even_say_what_it_has_nobody_waits_for_it(meet):
    found, measured = meet(2, lambda rank, size: None, devices=[Gpu(type="cpu"), Broken(type="cpu")])
    assert measured == []
    assert [one["from"] for one in found if "from" in one] == ["peer"]
    assert all("no CUDA-capable device" in one["error"] for one in found)


@pytest.mark.slow
def test_one_that_waits_heeds_a_stop(meet, tmp_path):
    def measure(rank, size):
        (tmp_path / "measuring").touch()
        time.sleep(200)

    def stop(rank):
        return (tmp_path / "measuring").exists()

    began = time.monotonic()
    found, _ = meet(2, measure, stop=stop)
    assert time.monotonic() - began < 100
    assert [one.get("stopped") for one in found] == [True, True]


# What a probe is given


def probes_of(run, device, timeouts, monkeypatch):
    for name, seconds in timeouts.items():
        monkeypatch.setattr(rank_probes, name, seconds)
    recipe = read_resolved(run.recipe)
    return RankProbes(run, recipe, probe.Ranks(), device, None, heed_stop=lambda: None, say=lambda line: None)


def test_the_first_probe_may_take_long_for_it_loads_libraries(make_run, engine, monkeypatch):
    def slow(*_, **__):
        time.sleep(1.0)
        return Probe(batch_size=8, images_per_s=1.0, memory_bytes=1, state_bytes=1)

    monkeypatch.setattr(probe, "measure", slow)
    probes = probes_of(make_run(), engine.cpu, {"PROBE_TIMEOUT_S": 0.3}, monkeypatch)
    assert probes.measure(8, None).batch_size == 8
    with pytest.raises(TooSlowError):
        probes.measure(16, None)


def test_every_size_is_stepped_once_before_it_is_timed(monkeypatch):
    """cudnn.benchmark tries all algorithms when it first meets a size: that takes longer than a turn."""
    order = []

    def step(size):
        seconds = 0.001 if size in order else 0.06
        order.append(size)
        time.sleep(seconds)
        return seconds

    monkeypatch.setattr(probe, "TURN_S", 0.05)
    seconds = probe._in_turn({size: functools.partial(step, size) for size in (8, 32, 16)}, turns=2)
    assert {size: max(found) for size, found in seconds.items()} == {8: 0.001, 32: 0.001, 16: 0.001}
    assert order[:3] == [32, 16, 8]


def test_no_batch_for_a_gpu_is_larger_than_its_host_can_load(make_run, monkeypatch):
    run = make_run(batch={"size": "auto", "global_size": 30})
    recipe, data_sets = read_resolved(run.recipe), open_data_sets(run)
    ranks, device = probe.Ranks(), Gpu(type="cpu")
    assert autotune._max_size(recipe, ranks, device, data_sets) == 30
    sample = data_sets.preprocessing.bytes_of_sample
    enough_for_20 = 2 * 20 * 14 * sample  # half of it is for loading
    monkeypatch.setattr(host_memory, "share", lambda num: FreeMemory(num_bytes=enough_for_20, limit="--mem"))
    assert autotune._max_size(recipe, ranks, device, data_sets) == 20
    assert autotune._max_size(recipe, ranks, replace(device, type="cuda"), data_sets) == 20


def test_a_stop_while_measuring_is_told_to_the_others(make_run, in_ranks):
    run = make_run(batch={"size": "auto"})
    found = [{"rank": 0, "host": "n0", "stopped": True}, {"rank": 1, "host": "n0", "stopped": True, "from": "peer"}]

    def rank(who):
        with pytest.raises(StoppedError):
            agree(run, read_resolved(run.recipe), who, found[who.rank], print)

    in_ranks(2, rank)
