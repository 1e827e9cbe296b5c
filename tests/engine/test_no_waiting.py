"""Nothing in a step waits for the device: on a GPU each of these operations would drain its queue.

What a CPU can show of it: which operations are called. tests/gpu has CUDA itself look.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.engine.distributed import Ranks
from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer

WAITING = {
    "aten::_local_scalar_dense": "item(), float(), bool(), tolist() of one number",
    "aten::nonzero": "nonzero, or an index that is a mask",
    "aten::masked_select": "masked_select",
    "aten::unique_dim": "unique",
    "aten::_unique2": "unique",
    "aten::equal": "torch.equal",
    "aten::lift_fresh": "torch.tensor of numbers, which a GPU waits to be copied",
}


class Watch(TorchDispatchMode):
    """Notes the operations that wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        if name in WAITING:
            self.found.append(f"{name}: {WAITING[name]}")
        if name == "aten::where" and any(not one.dim() for one in args[1:]) and any(one.dim() for one in args):
            self.found.append("aten::where with a number, which is copied")
        return function(*args, **(kwargs or {}))


RECIPES = {
    "plain": {},
    "clipped": {"train": {"clip_grad_norm": 1.0, "label_smoothing": 0.1}},
    "fp16": {"precision": "fp16"},
    "accumulated": {"batch": {"size": 4, "accumulate": 2}},
    "focal": {"train": {"loss": "focal"}, "optim": {"name": "adamw"}},
    "with BatchNorm": {"model": {"arch": "shufflenet_v2_x0_5"}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_no_operation_of_a_step_waits_for_the_device(make_run, engine, one_rank, monkeypatch, name):
    run = make_run(**{"batch": {"size": 8}, "tracking": {"log_every": 1}} | RECIPES[name])
    device = engine.from_scale(256.0)
    monkeypatch.setattr(type(device), "runs_ahead", True)
    trainer = Trainer(build_parts(run, Ranks(), device), recorder=None, stop_requested=engine.never)
    steps, watch = [], Watch()
    take = trainer._step.run

    def watched(step, batches):
        batches = iter(list(batches))  # which the loader has made
        steps.append(step)
        if len(steps) == 1:  # it makes the optimizer's state, and constants
            return take(step, batches)
        with watch:
            return take(step, batches)

    def logged(*arguments):
        with watch:
            return end_window(*arguments)

    trainer._step.run = watched
    end_window, trainer._log.end_window = trainer._log.end_window, logged
    trainer._log._recorder = object()  # as on rank 0; a GPU's windows are read later
    trainer._end_epoch = lambda *_: None
    trainer._prepare_epoch()
    trainer._begin_feed()
    while len(steps) < 3:
        trainer._take_next()
    assert watch.found == []
    with watch:
        torch.zeros(2).sum().item()
    assert len(watch.found) == 1
