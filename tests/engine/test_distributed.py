from __future__ import annotations

import functools
import multiprocessing
import os
import socket
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from launcher.engine import distributed
from launcher.engine.distributed import Agreement, Ranks
from launcher.runs.heartbeats import JOINING, MEETING, PHASES, patience_s
from launcher.system.processes import die_with_parent
from tests import ports

VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def without_an_agent(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_ranks_are_those_of_the_agents_environment(monkeypatch):
    for name, value in zip(VARIABLES, ("5", "1", "2", "6", "2"), strict=False):
        monkeypatch.setenv(name, value)
    found = Ranks.from_environment()
    assert found == Ranks(rank=5, local_rank=1, local_world_size=2, world_size=6, node_rank=2)


def test_without_an_agent_there_is_one_rank(engine):
    assert Ranks.from_environment() == Ranks()
    distributed.init_process_group(engine.cpu, Ranks())
    try:
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        assert distributed.sum_over_ranks(torch.tensor([2, 3])).tolist() == [2, 3]
    finally:
        dist.destroy_process_group()


def _join(engine, environment, queue):
    die_with_parent()
    os.environ.update(environment)
    ranks = Ranks.from_environment()
    distributed.init_process_group(engine.cpu, ranks)
    queue.put((ranks.rank, distributed.sum_over_ranks(torch.tensor(10 + ranks.rank)).item()))
    dist.destroy_process_group()


def test_ranks_join_the_group_that_the_agents_environment_names(engine):
    port = str(ports.free())
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        fork.Process(target=_join, args=(engine, {**address, "RANK": str(r), "LOCAL_RANK": str(r)}, queue))
        for r in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(queue.get() for _ in processes) == [(0, 21), (1, 21)]


@pytest.mark.parametrize("late_rank", [0, 1])
def test_ranks_wait_for_one_that_comes_late_and_say_all_the_while_that_they_live(engine, late_rank):
    """It may be measuring its batch size; were it hung, the watchdog of its own node would find it."""
    port = str(ports.free())
    fork = multiprocessing.get_context("fork")
    waits, told = fork.Event(), fork.SimpleQueue()

    def join(rank):
        die_with_parent()
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        if rank == late_rank:
            waits.wait(100)
        phases = []

        def at(phase):
            phases.append(phase)
            if len(phases) == 5:  # it has waited for a while
                waits.set()

        distributed.init_process_group(engine.cpu, Ranks(rank=rank, world_size=2), hang_timeout_s=0.1, at=at)
        told.put((rank, phases, distributed.sum_over_ranks(torch.tensor(1)).item()))
        dist.destroy_process_group()

    ranks = [fork.Process(target=join, args=(rank,)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
    assert [process.exitcode for process in ranks] == [0, 0]
    found = {rank: (phases, total) for rank, phases, total in (told.get() for _ in ranks)}
    assert {total for _, total in found.values()} == {2}
    assert found[1 - late_rank][0][:5] == [MEETING] * 5
    assert found[1 - late_rank][0][-1] == JOINING
    assert found[late_rank][0][0] == MEETING


def test_ranks_that_never_come_together_end_with_an_error(monkeypatch):
    port = str(ports.free())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setattr(distributed, "LATE_S", 0.2)
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(distributed, "time", clock)
    for rank in (1, 0):  # nobody listens, and nobody comes
        told = []
        with pytest.raises(dist.DistStoreError, match="not all workers have come together"):
            distributed._meet(Ranks(rank=rank, world_size=2), timedelta(seconds=1), told.append)
        assert 2 < len(told) < 10  # it says that it lives for a while, not for ever


def test_a_machine_that_does_not_answer_is_no_rank_that_comes_late(monkeypatch):
    def no_answer(*_, **__):
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", no_answer)
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setenv("MASTER_PORT", "29400")
    told = []
    with pytest.raises(dist.DistStoreError):
        distributed._meet(Ranks(rank=1, world_size=2), timedelta(seconds=0.3), told.append)
    assert told == []


def test_torchs_monitor_of_nccl_waits_longer_than_the_watchdog(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {})
    distributed.record_collectives(tmp_path / "dump", tmp_path / "pipe", 600.0)
    assert int(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > max(patience_s(600.0, phase) for phase in PHASES)


def test_sums_are_over_all_ranks_and_in_place(in_ranks):
    def work(ranks):
        own = torch.tensor([ranks.rank, 10**12 + ranks.rank], dtype=torch.float64)
        assert distributed.sum_over_ranks(own) is own
        return own

    for found in in_ranks(3, work):
        assert found.tolist() == [3, 3 * 10**12 + 3]


def test_every_rank_gets_rank_0s_buffers_and_keeps_its_parameters(in_ranks):
    def work(ranks):
        module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
        for tensor in module.state_dict().values():
            tensor.fill_(ranks.rank + 1)
        distributed.broadcast_buffers(module)
        return {name: tensor.flatten()[0].item() for name, tensor in module.state_dict().items()}

    for rank, found in enumerate(in_ranks(3, work)):
        for name, value in found.items():
            assert value == (1 if "running" in name or "num_batches" in name else rank + 1)


def test_what_one_rank_wishes_all_ranks_learn_at_the_same_step(in_ranks):
    wishes = {(1, 3): (True, False), (2, 5): (False, True), (0, 7): (True, False), (2, 7): (False, True)}

    def work(ranks):
        agreement = Agreement(num_wishes=2)
        learned = []
        for step in range(10):
            learned.append(agreement.collect())
            agreement.propose(*wishes.get((ranks.rank, step), (False, False)))
        return [*learned, agreement.collect(), agreement.collect()]

    expected = [(False, False)] * 12
    expected[4], expected[6], expected[8] = (True, False), (False, True), (True, True)
    assert in_ranks(3, work) == [expected] * 3


def test_nothing_is_agreed_before_anything_was_proposed(one_rank):
    assert Agreement(num_wishes=3).collect() == (False, False, False)


def test_a_proposal_does_not_wait_for_a_rank_that_is_late(in_ranks):
    def work(ranks):
        agreement = Agreement(num_wishes=1)
        if ranks.rank == 0:
            agreement.propose(True)
            dist.barrier()  # rank 1 proposes only after it: had we waited, neither would get here
        else:
            dist.barrier()
            agreement.propose(False)
        return agreement.collect()

    assert in_ranks(2, work) == [(True,)] * 2


def handed_on(ranks, *, seed_of):
    """What a rank's first weight is once DDP is there, and whether DDP handed weights on."""
    torch.manual_seed(seed_of(ranks.rank))
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    module.to(memory_format=torch.channels_last)
    module[0].weight.requires_grad_(requires_grad=False)  # frozen weights count too
    same = distributed.are_everywhere_the_same(module.parameters())
    ddp = torch.nn.parallel.DistributedDataParallel(module, init_sync=not same)
    return same, ddp.module[0].weight.detach().clone()


@pytest.mark.parametrize(("seed_of", "same"), [(lambda rank: 5, True), (lambda rank: 5 + (rank == 1), False)])
def test_weights_are_handed_on_unless_all_ranks_have_the_same(in_ranks, seed_of, same):
    found = in_ranks(3, functools.partial(handed_on, seed_of=seed_of))
    assert [one for one, _ in found] == [same] * 3
    assert all(torch.equal(weight, found[0][1]) for _, weight in found)


def test_one_bit_is_a_difference(in_ranks):
    def compare(ranks):
        weight = torch.ones(1000, dtype=torch.bfloat16)
        same = distributed.are_everywhere_the_same([weight, torch.zeros(0)])
        if ranks.rank:
            weight.view(torch.int16)[777] ^= 1
        return same, distributed.are_everywhere_the_same([weight, torch.zeros(0)])

    assert in_ranks(2, compare) == [(True, False)] * 2
