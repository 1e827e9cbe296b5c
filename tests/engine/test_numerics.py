"""What a step is computed in: all ranks take the same, and a checkpoint goes on in another."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from launcher.engine import numerics, optim
from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.device import Device
from launcher.engine.distributed import Ranks
from launcher.engine.model import FineTunedModel
from launcher.engine.numerics import Preference
from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer
from launcher.recipe.schema import ModelConfig, OptimConfig


@dataclass(frozen=True, kw_only=True)
class Prefers(Device):
    """A CPU in the place of a GPU that has its own preferences, whose gradients never overflow."""

    auto: str = "fp32"
    nhwc: bool = False

    def precision(self, wanted):
        return self.auto if wanted == "auto" else wanted

    @property
    def channels_last(self):
        return self.nhwc

    def grad_scaler(self, precision):
        return torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16")


def events(run, kind):
    return [e for line in run.events.read_text().splitlines() if (e := json.loads(line))["kind"] == kind]


def preference(rank, **preferred):
    known = {"precision": "fp32", "channels_last": False}
    return Preference(rank=rank, host=f"n{rank}", device=f"GPU {rank}", **known | preferred)


@pytest.mark.parametrize(
    ("wanted", "precision", "why"),
    [
        (["bf16", "bf16"], "bf16", ""),
        (["bf16", "fp16", "bf16"], "fp16", "the best that rank 1 on n1 has (GPU 1)"),
        (["fp16", "fp16"], "fp16", ""),
        (["bf16", "fp32"], "fp32", "the best that rank 1 on n1 has (GPU 1)"),
    ],
)
def test_all_take_the_best_that_all_have(wanted, precision, why):
    found = numerics.common([preference(rank, precision=one) for rank, one in enumerate(wanted)])
    assert (found.precision, found.why) == (precision, why)


@pytest.mark.parametrize(("wanted", "expected"), [([True, True], True), ([True, False], False)])
def test_a_memory_layout_is_taken_where_all_prefer_it(wanted, expected):
    found = numerics.common([preference(rank, channels_last=one) for rank, one in enumerate(wanted)])
    assert found.channels_last is expected


def train(run, who, device, stop=lambda: False, records=None):
    parts = build_parts(run, who, device)
    trainer = Trainer(parts, recorder=records if who.rank == 0 else None, stop_requested=stop)
    trainer.run()
    return parts, trainer.state


@pytest.mark.slow
def test_ranks_whose_devices_differ_train_in_one_precision_and_one_layout(make_run, engine, in_ranks):
    """One whose gradients are scaled, beside one whose gradients are not, would come to other weights or to no end."""
    run = make_run(precision="auto", batch={"size": 9})
    devices = [Prefers(type="cpu", auto="bf16", nhwc=True), Prefers(type="cpu", auto="fp16")]

    def rank(who):
        parts, _ = train(run, who, devices[who.rank], records=engine.records(run))
        return parts.precision, parts.numerics.channels_last, dict(parts.model.module.state_dict())

    one, other = in_ranks(2, rank)
    assert one[:2] == other[:2] == ("fp16", False)
    assert engine.identical(one[2], other[2])
    saved = checkpoints.load(run.last_checkpoint)
    assert (saved.state["precision"], saved.state["channels_last"]) == ("fp16", False)
    assert saved.optimizer["scaler"]["scale"] == 256.0


class Says:
    """A recorder that keeps what it says."""

    def __init__(self, records):
        self._records = records
        self.said = []

    def say(self, line):
        self.said.append(line)

    def __getattr__(self, name):
        return getattr(self._records, name)


@pytest.mark.slow
def test_a_run_goes_on_in_another_precision_and_tells(make_run, engine, one_rank):
    """fp16 begins with a scale of its own; what fp16 left behind is of no use to bf16."""
    run = make_run(precision="auto", batch={"size": 9}, train={"epochs": 3})
    found = []
    for polls, precision in enumerate(("bf16", "fp16", "bf16"), start=2):
        says, device = Says(engine.records(run)), Prefers(type="cpu", auto=precision)
        train(run, Ranks(), device, engine.at_poll(polls), says)
        saved = checkpoints.load(run.last_checkpoint)
        found.append((saved.state["precision"], saved.optimizer["scaler"].get("scale"), says.said))
    assert [one[:2] for one in found] == [("bf16", None), ("fp16", 256.0), ("bf16", None)]
    changed = [(event["step"], *event["precision"]) for event in events(run, "numerics_changed")]
    assert [one[1:] for one in changed] == [("bf16", "fp16"), ("fp16", "bf16")]
    lines = [[f"from step {step} on: precision is {now} now, was {then}"] for step, then, now in changed]
    assert [one[2] for one in found] == [[], *lines]


def tiny(layout):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(5, 4, 3), torch.nn.Conv2d(4, 3, 1)).to(memory_format=layout)
    return FineTunedModel(module, ModelConfig(arch="resnet18", weights=None), head=["1"])


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.module.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.step()


LAYOUTS = [torch.channels_last, torch.contiguous_format]


@pytest.mark.parametrize("then", LAYOUTS)
@pytest.mark.parametrize("now", LAYOUTS)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_momentum_and_moments_follow_the_memory_layout_of_the_weights(name, then, now):
    """Fused kernels take weights, gradients and state as they lie in memory."""
    config = OptimConfig(name=name, lr=0.1, momentum=0.9)
    whole, before, after = tiny(torch.contiguous_format), tiny(then), tiny(now)
    optimizers = [optim.build_optimizer(model, config) for model in (whole, before, after)]
    for model, optimizer in zip((whole, before), optimizers, strict=False):
        step(model, optimizer, 1)
        step(model, optimizer, 2)
    after.module.load_state_dict(before.module.state_dict())
    optim.restore(optimizers[2], after, optim.saved(optimizers[1]))
    for model, optimizer in ((whole, optimizers[0]), (after, optimizers[2])):
        step(model, optimizer, 3)
    for expected, found in zip(whole.module.parameters(), after.module.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    for parameter, state in optimizers[2].state.items():
        held = [value for value in state.values() if value.shape == parameter.shape]
        assert held
        assert all(value.stride() == parameter.stride() for value in held)


@pytest.mark.slow
@pytest.mark.parametrize(("then", "now"), [(True, False), (False, True)])
def test_a_run_goes_on_in_another_memory_layout(make_run, engine, one_rank, then, now):
    run, whole = (make_run(name, batch={"size": 9}, train={"channels_last": "auto"}) for name in ("run", "whole"))
    layouts = [replace(Prefers(type="cpu"), nhwc=nhwc) for nhwc in (then, now)]
    torch.manual_seed(0)
    train(run, Ranks(), layouts[0], engine.at_poll(3), engine.records(run))
    found, _ = train(run, Ranks(), layouts[1], records=engine.records(run))
    expected, _ = train(whole, Ranks(), layouts[0], records=engine.records(whole))
    assert engine.largest_difference(found.model.module.state_dict(), expected.model.module.state_dict()) < 1e-4
    assert [event["channels_last"] for event in events(run, "numerics_changed")] == [[then, now]]
