"""BatchNorm over ranks against BatchNorm over the same images in one process."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from launcher.engine import batchnorm_recompute, recipe_checks
from launcher.engine.distributed import Ranks
from launcher.engine.micro_batch import ExchangeMemoryError
from launcher.engine.network.sync_batchnorm import SyncBatchNorm, standing_in, synchronise
from launcher.engine.schedule import Batching
from launcher.engine.setup import build_parts
from tests import nets


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2, momentum=None)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * 4 * 4, 3), nn.BatchNorm1d(3, affine=False)).double()


def gradients(net, images, targets):
    loss = (net(images) * targets).sum()
    net.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


def test_gradient_and_statistics_are_those_of_all_images_at_once(in_ranks):
    images, targets = torch.rand(8, 3, 8, 8).double() * 5, torch.rand(8, 3).double()
    shares = ((0, 6), (6, 8), (8, 8))

    def of_rank(ranks):
        net = network()
        assert synchronise(net)
        for _ in range(2):
            start, end = shares[ranks.rank]
            own = images[start:end]
            if start == end:
                with standing_in(net):
                    found = gradients(net, torch.ones(1, 3, 8, 8).double(), torch.zeros(1, 3).double())
            else:
                found = gradients(net, own, targets[start:end])
        return found, net.state_dict()

    expected = network()
    for _ in range(2):
        whole = gradients(expected, images, targets)
    ranks = in_ranks(3, of_rank)
    for place, gradient in enumerate(whole):
        torch.testing.assert_close(sum(found[place] for found, _ in ranks), gradient, rtol=0, atol=1e-9)
    for name, value in expected.state_dict().items():
        for _, state in ranks:
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)


def test_names_parameters_and_evaluation_stay_those_of_the_layers_that_were_there():
    net, other = network(), network()
    assert synchronise(other)
    assert other.state_dict().keys() == net.state_dict().keys()
    assert [type(layer) for layer in other if isinstance(layer, SyncBatchNorm)]
    images = torch.rand(3, 3, 8, 8).double()
    assert torch.equal(net.eval()(images), other.eval()(images))


class Shifted(nn.BatchNorm2d):
    """Adds something of its own, as timm's BatchNormAct2d does."""

    def forward(self, images):
        return super().forward(images) + 1


def test_layers_of_a_class_of_their_own_are_refused_and_stay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Shifted(4), nn.SyncBatchNorm(4))
    model = SimpleNamespace(sync_batchnorm=True, label="net.py:Net")
    ((key, text),) = recipe_checks._batchnorm(SimpleNamespace(model=model), net)
    assert key == "model.sync_batchnorm"
    assert "'2' of net.py:Net is no plain BatchNorm (a Shifted)" in text
    synchronise(net)
    assert [type(layer) for layer in net[1:]] == [SyncBatchNorm, Shifted, SyncBatchNorm]
    assert not list(recipe_checks._batchnorm(SimpleNamespace(model=model), network()))


def test_statistics_computed_anew_are_those_of_a_rank_of_single_values(one_rank):
    layer = SyncBatchNorm(2)
    sums = batchnorm_recompute._Sums([layer], torch.device("cpu"))
    for values in ((1.0, 4.0), (3.0, 8.0)):
        sums.add(layer, (torch.tensor([values]),))
    sums.hand_over()
    assert layer.running_mean.tolist() == [2, 6]
    assert layer.running_var.tolist() == [1, 4]


NET = {
    "model": nets.NET | {"sync_batchnorm": True},
    "optim": {"lr": 1e-2, "momentum": 0.0},
    "train": {"epochs": 2, "batchnorm_recompute": 0},
}


def test_uneven_ranks_learn_what_one_rank_does(make_run, engine, in_ranks):
    """So they do not without it: each would normalise by its own images."""
    run, alone, plain = (
        make_run(**NET),
        make_run("alone", **NET),
        make_run("plain", **NET | {"model": nets.NET}),
    )

    def uneven(parts):
        batching = Batching(batch_sizes=(12, 6), shares=(2, 1), global_batch_size=18)
        parts.schedule = replace(parts.schedule, batching=batching)
        engine.without_dropout(parts)

    (expected,) = in_ranks(1, lambda who: engine.train(alone, who, prepare=engine.without_dropout))
    found = in_ranks(2, lambda who: engine.train(run, who, prepare=uneven))
    without = in_ranks(2, lambda who: engine.train(plain, who, prepare=uneven))
    counters = [name for name in expected.state if name.endswith("tracked")]
    for one in (expected, *found, *without):
        for name in counters:
            del one.state[name]
    moved = engine.largest_difference(expected.state, {name: expected.initial[name] for name in expected.state})
    assert engine.largest_difference(found[0].state, expected.state) < 1e-3 * moved
    assert engine.largest_difference(without[0].state, expected.state) > 1e-2 * moved


@pytest.mark.parametrize("changes", [{}, {"data": {"mixup": 0.2}}])
def test_ranks_that_would_take_steps_in_different_numbers_of_parts_take_as_many(make_run, engine, in_ranks, changes):
    run = make_run(**NET | {"train": {"epochs": 1, "batchnorm_recompute": 3}}, **changes)

    def uneven(parts):
        batching = Batching(batch_sizes=(2, 9), shares=(3, 1), global_batch_size=16)
        parts.schedule = replace(parts.schedule, batching=batching)

    found = in_ranks(2, lambda who: engine.train(run, who, prepare=uneven))
    assert [one.outcome for one in found] == ["completed"] * 2
    assert engine.identical(found[0].state, found[1].state)


def test_one_rank_has_nothing_to_synchronise(make_run, engine, one_rank):
    layers = build_parts(make_run(**NET), Ranks(), engine.cpu).model.module.modules()
    assert not any(isinstance(layer, SyncBatchNorm) for layer in layers)


def test_memory_that_runs_out_in_a_pass_of_all_ends_the_attempt(make_run, engine, in_ranks):
    """The other ranks wait in the middle of the network, where nothing can be done again."""
    run = make_run(**NET)

    def train(ranks):
        def prepare(parts):
            def fail(module, inputs):
                if module.training and ranks.rank:
                    raise torch.OutOfMemoryError("DefaultCPUAllocator: not enough memory")

            parts.model.module.features[2].register_forward_pre_hook(fail)

        with pytest.raises(
            ExchangeMemoryError if ranks.rank else Exception, match=r"all ranks made a pass|closed|reset|peer"
        ):
            engine.train(run, ranks, prepare=prepare)
        return True

    assert in_ranks(2, train) == [True, True]
