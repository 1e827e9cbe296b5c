"""Real training on the GPUs of this machine; skipped where there is none.

LAUNCH_GPU_TESTS_ON=cpu runs what a CPU can show of these tests there, over gloo, to try the tests themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from launcher.engine.device import Device
from launcher.engine.distributed import Ranks
from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer
from launcher.plan import topology
from launcher.system.processes import die_with_parent
from tests.engine.conftest import Records, identical, largest_difference, make_run, photos

__all__ = ["make_run", "photos"]

VARIABLE = "LAUNCH_GPU_TESTS_ON"
DEADLINE = timedelta(seconds=120)
MOST = 8
"""Processes of a test, at most."""


@pytest.fixture(scope="session")
def where():
    """Kind and number of the devices. This process touches none: CUDA cannot be used in a fork of one that has."""
    if os.environ.get(VARIABLE) == "cpu":
        return SimpleNamespace(type="cpu", num=2)
    num = topology.detect().num_gpus
    if not num:
        pytest.skip("no GPU")
    return SimpleNamespace(type="cuda", num=min(num, MOST))


@pytest.fixture
def cuda(where):
    """For what only CUDA can show."""
    if where.type != "cuda":
        pytest.skip("only on CUDA")
    return where


@pytest.fixture
def several(where):
    """How many devices there are, of two at least."""
    if where.num < 2:
        pytest.skip("needs two GPUs")
    return where.num


def _rank_main(function, folder, ranks, kind):
    die_with_parent()
    try:
        torch.set_num_threads(1)
        device = Device(type=kind, index=ranks.local_rank)
        device.activate()
        options = {"device_id": device.torch_device} if device.is_cuda else {}
        dist.init_process_group(
            device.process_group_backend,
            store=dist.FileStore(str(folder / "store"), ranks.world_size),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=DEADLINE,
            **options,
        )
        torch.save(function(ranks, device), folder / f"rank-{ranks.rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"rank-{ranks.rank}.txt").write_text(traceback.format_exc())
        os._exit(1)


@pytest.fixture
def on_devices(where, tmp_path_factory):
    """Call ``function(ranks, device)`` in a process for each of some devices; return what each of them returned."""

    def call(num, function):
        folder = tmp_path_factory.mktemp("ranks")
        fork = multiprocessing.get_context("fork")
        ranks = [Ranks(rank=r, local_rank=r, world_size=num, local_world_size=num) for r in range(num)]
        processes = [fork.Process(target=_rank_main, args=(function, folder, who, where.type)) for who in ranks]
        for process in processes:
            process.start()
        for process in processes:
            process.join(DEADLINE.total_seconds())
        for process in processes:
            process.kill()
        errors = [file.read_text() for file in sorted(folder.glob("rank-*.txt"))]
        assert [process.exitcode for process in processes] == [0] * num, "\n".join(errors)
        return [torch.load(folder / f"rank-{r}.pt", weights_only=False) for r in range(num)]

    return call


def train(run, ranks, device, *, stop=lambda: False, prepare=lambda trainer: None):
    """Train a run on one rank, in the process group that is there; return what came out, on the host."""
    parts = build_parts(run, ranks, device)
    records = Records(run) if ranks.rank == 0 else None
    trainer = Trainer(parts, recorder=records, stop_requested=stop)
    prepare(trainer)
    outcome = trainer.run()
    return SimpleNamespace(
        outcome=outcome,
        state={name: value.detach().cpu().clone() for name, value in parts.model.module.state_dict().items()},
        lines=records.lines if records else [],
        precision=parts.precision,
    )


@pytest.fixture
def engine():
    """What tests of the engine share."""
    return SimpleNamespace(train=train, identical=identical, largest_difference=largest_difference)
