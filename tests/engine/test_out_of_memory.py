"""Memory that runs out in training. A module that refuses batches of more than a size stands for a GPU that is full."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from launcher.engine.checkpoints.checkpoint import read_state
from launcher.engine.device import Device
from launcher.engine.micro_batch import ExchangeMemoryError
from launcher.engine.worker import error_kind
from launcher.runs.diagnose import NOT_RETRYABLE
from launcher.runs.run_dir import RunDir


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images.clone()

    @staticmethod
    def backward(ctx, _):
        raise torch.OutOfMemoryError("CUDA out of memory (a test)")


@pytest.fixture
def make_run(make_run):
    """With a model whose gradients DDP exchanges in several parts."""
    return lambda name="run", **changes: make_run(name, **({"model": {"arch": "squeezenet1_1"}} | changes))


class Full(nn.Module):
    """Passes batches on, up to a size."""

    def __init__(self, inner, *, most, where):
        super().__init__()
        self.inner = inner
        self._most = most
        self._where = where

    def forward(self, images):
        if self.training and len(images) > self._most:
            if self._where == "forward":
                self.inner(images)  # some way in
                raise torch.OutOfMemoryError("CUDA out of memory (a test)")
            return _FailsInBackward.apply(self.inner(images))
        return self.inner(images)


def full(parts, *, layer, **options):
    if options["where"] == "loss":
        full_in_the_loss(options["most"])
    elif layer == "classifier":
        parts.model.module.classifier = Full(parts.model.module.classifier, **options)
    else:
        module = parts.model.module.features
        module[layer] = Full(module[layer], **options)


def full_in_the_loss(most):
    """For this process: the forward pass through the model is done by then, and DDP awaits the backward pass."""
    entropy = nn.functional.cross_entropy

    def limited(logits, *arguments, **options):
        if logits.requires_grad and len(logits) > most:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        return entropy(logits, *arguments, **options)

    nn.functional.cross_entropy = limited


def strip(state):
    return {name.replace("inner.", ""): value for name, value in state.items()}


def events(run, kind):
    return [e for line in run.events.read_text().splitlines() if (e := json.loads(line))["kind"] == kind]


def counted(lines):
    """Without what is a sum of numbers that the size of a batch rounds."""
    return [{k: v for k, v in line.items() if not k.endswith(("loss", "grad_norm", "ece"))} for line in lines]


# In squeezenet layer 0 comes first in the forward pass and last in the backward pass: DDP has begun to exchange the
# gradients of all others by then. After layer 12 none has been. After the classifier, or in the loss, the backward pass
# has come to no gradient at all.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "layer", "world_size", "size", "accumulate"),
    [
        ("forward", 0, 2, 9, 1),
        ("forward", 7, 2, 5, 2),
        ("backward", 0, 2, 9, 1),
        ("backward", 7, 2, 5, 2),
        ("backward", 12, 2, 9, 1),
        ("backward", 7, 1, 9, 2),
        ("backward", "classifier", 2, 9, 1),
        ("backward", "classifier", 2, 5, 2),
        ("loss", None, 2, 9, 1),
    ],
)
def test_one_rank_out_of_memory_takes_smaller_batches_and_the_weights_are_the_same(
    make_run, engine, in_ranks, where, layer, world_size, size, accumulate
):
    batch = {"size": size, "accumulate": accumulate}

    def prepare(parts, last):
        engine.without_dropout(parts)
        full(parts, layer=layer, most=2 if parts.ranks.rank == last else 1000, where=where)

    quiet, run = make_run("quiet", batch=batch), make_run("full", batch=batch)
    undisturbed = in_ranks(world_size, lambda who: engine.train(quiet, who, prepare=engine.without_dropout))
    found = in_ranks(
        world_size, lambda who: engine.train(run, who, prepare=lambda parts: prepare(parts, world_size - 1))
    )
    assert found[0].outcome == "completed"
    assert engine.largest_difference(strip(found[0].state), undisturbed[0].state) < 2e-6
    assert all(engine.identical(rank.state, found[0].state) for rank in found)
    assert counted(found[0].lines) == counted(undisturbed[0].lines)
    (event,) = events(run, "out_of_memory")
    old, new = event["batch_sizes"][str(world_size - 1)]
    assert (old, len(event["batch_sizes"])) == (size, 1)
    assert new == 2
    assert read_state(run.last_checkpoint)["batch_limits"][world_size - 1] == 2
    assert read_state(run.last_checkpoint)["batching"]["batch_sizes"][world_size - 1] == 2


@pytest.mark.slow
def test_a_run_that_goes_on_after_memory_ran_out_keeps_the_smaller_batches(make_run, engine, in_ranks):
    def prepare(parts):
        full(parts, layer=7, most=2 if parts.ranks.rank else 1000, where="backward")

    run, whole = make_run("stopped", train={"epochs": 2}), make_run("whole", train={"epochs": 2})
    stop = engine.at_poll(5)
    cut = in_ranks(2, lambda who: engine.train(run, who, prepare=prepare, stop=stop))[0]
    assert cut.outcome == "preempted"
    resumed = in_ranks(2, lambda who: engine.train(run, who, prepare=prepare))
    undisturbed = in_ranks(2, lambda who: engine.train(whole, who, prepare=prepare))
    assert engine.identical(resumed[0].state, undisturbed[0].state)
    assert len(events(run, "out_of_memory")) == 1


@dataclass(frozen=True, kw_only=True)
class Larger(Device):
    """A CPU with memory of another size."""

    def total_memory(self):
        return super().total_memory() + 1


@pytest.mark.slow
def test_on_another_device_a_run_goes_on_with_the_batches_that_it_would_have_had(make_run, engine, in_ranks):
    def prepare(parts, device):
        parts.device = device if parts.ranks.rank else engine.cpu
        full(parts, layer=7, most=2 if device is engine.cpu and parts.ranks.rank else 1000, where="backward")

    def train(stop, device):
        return in_ranks(2, lambda who: engine.train(run, who, stop=stop, prepare=lambda parts: prepare(parts, device)))

    run = make_run(train={"epochs": 3})
    train(engine.at_poll(3), engine.cpu)
    assert read_state(run.last_checkpoint)["batch_limits"] == [18, 2]
    train(engine.at_poll(2), engine.cpu)
    assert read_state(run.last_checkpoint)["batching"]["batch_sizes"] == [18, 2]
    train(engine.never, Larger(type="cpu"))
    assert read_state(run.last_checkpoint)["batching"]["batch_sizes"] == [18, 18]
    assert len(events(run, "out_of_memory")) == 1


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_not_even_one_image_fits(make_run, engine, one_rank, where):
    with pytest.raises(torch.OutOfMemoryError):
        engine.train(make_run(), prepare=lambda parts: full(parts, layer=7, most=0, where=where))


def test_another_error_is_no_lack_of_memory(make_run, engine, one_rank):
    def prepare(parts):
        def fail(*_):
            raise RuntimeError("something else")

        parts.model.module.features[7].register_forward_hook(fail)

    with pytest.raises(RuntimeError, match="something else"):
        engine.train(make_run(), prepare=prepare)


def test_batchnorm_statistics_are_those_of_the_batches_that_went_through(make_run, engine, one_rank):
    """A pass that broke off leaves nothing behind: the same as if the smaller batches had been meant."""
    run, halves = (make_run(name, model={"arch": "shufflenet_v2_x0_5"}, batch={"size": 12}) for name in ("a", "b"))

    def prepare(parts):
        parts.model.module.stage3 = Full(parts.model.module.stage3, most=6, where="forward")

    def small(parts):
        batching = parts.schedule.batching
        parts.schedule = replace(parts.schedule, batching=replace(batching, batch_sizes=(6,)))

    found = engine.train(run, prepare=prepare)
    expected = engine.train(halves, prepare=small)
    assert engine.largest_difference(strip(found.state), expected.state) < 1e-5


# Within DDP


def exchange_fails(parts, *, rank, which):
    """Have DDP's own work on a bucket of gradients end for want of memory, as NCCL's may."""
    wrap, asked = parts.wrap, iter(range(1000))

    def fail(state, bucket):
        if parts.ranks.rank == rank and next(asked) == which:
            raise torch.distributed.DistBackendError("Last error:\nCuda failure 2 'out of memory'")
        return allreduce_hook(state, bucket)

    def wrap_small():
        wrap()
        parts.ddp = DistributedDataParallel(parts.model.module, bucket_cap_mb=1, gradient_as_bucket_view=True)
        parts.ddp.register_comm_hook(None, fail)

    parts.wrap = wrap_small


# A step of squeezenet has three buckets of a megabyte; the second step begins with the fourth.
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("which", [0, 1, 2, 4])
def test_memory_that_runs_out_within_ddp_ends_the_attempt(make_run, engine, one_rank, which, accumulate):
    run = make_run(batch={"size": 4, "accumulate": accumulate})
    with pytest.raises(ExchangeMemoryError, match="again: Last error: Cuda failure 2 'out of") as found:
        engine.train(run, prepare=lambda parts: exchange_fails(parts, rank=0, which=which))
    assert error_kind(found.value) == "memory_kill"
    assert not list(run.checkpoints.glob("step-*"))


@pytest.mark.parametrize("where", ["_pre_forward", "_post_forward"])
def test_also_before_and_after_the_models_own_forward_pass(make_run, engine, one_rank, monkeypatch, where):
    """DDP lays its buckets out anew there, once."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory (a test)")

    monkeypatch.setattr(DistributedDataParallel, where, fail)
    with pytest.raises(ExchangeMemoryError):
        engine.train(make_run())


def test_an_error_of_nccls_that_says_that_memory_ran_out_is_met_with_smaller_batches():
    ran_out = torch.distributed.DistBackendError("NCCL error …\nLast error:\nCuda failure 'out of memory'")
    assert error_kind(ran_out) == "memory_kill"
    assert error_kind(torch.OutOfMemoryError("CUDA out of memory")) == "out_of_memory"
    assert "memory_kill" not in NOT_RETRYABLE


MODEL = """
import os

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


init = DistributedDataParallel.__init__


def make(num_classes):
    if os.environ.get("LAUNCH_ATTEMPT") == "1" and os.environ.get("RANK") == "1":

        def fail(state, bucket):
            raise torch.distributed.DistBackendError("Last error: Cuda failure 'out of memory'")

        def with_hook(self, *arguments, **options):
            init(self, *arguments, **options)
            self.register_comm_hook(None, fail)

        DistributedDataParallel.__init__ = with_hook
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


@pytest.mark.slow
def test_a_run_goes_on_with_smaller_batches_after_memory_ran_out_within_ddp(warm_launch, photos, tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "recipe.yaml").write_text(
        f"""
name: full
model: {{factory: "{tmp_path}/model.py:make", weights: null, head: ["3"]}}
data: {{path: {photos}, image_size: 32, augment: none, workers: 0}}
batch: {{size: 8}}
precision: fp32
train: {{epochs: 1}}
tracking: {{wandb: {{mode: disabled}}}}
post: {{enabled: false}}
launch: {{device: cpu, procs: 2, threads: 1, max_restarts: 1}}
"""
    )
    run = RunDir(tmp_path / "run")
    done = warm_launch(str(tmp_path / "recipe.yaml"), "--run-dir", str(run.path))
    assert done.returncode == 0, done.stderr
    assert "attempt 1 ended: memory ran out while DDP exchanged gradients" in done.stderr
    (event,) = events(run, "memory_kill")
    assert (event["attempt"], event["node"], event["rank"]) == (1, 0, 1)
    assert [event["cause"] for event in events(run, "attempt_ended")] == ["memory_kill"]
    assert [event["batch_sizes"] for event in events(run, "out_of_memory")] == [{"0": [8, 4], "1": [8, 4]}]
    assert read_state(run.last_checkpoint)["batching"]["global_batch_size"] == 16
