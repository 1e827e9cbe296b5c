from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from launcher.engine.augmenting.mixing import Mix, choose_mix, with_partners
from launcher.engine.metrics import TrainTotals, count, means
from launcher.engine.micro_batch import _halves
from launcher.engine.schedule import Batching, Schedule
from launcher.recipe.schema_data import DataConfig


def of(step, **config):
    return choose_mix(DataConfig(**config), seed=3, step=step, size=20)


def test_it_is_a_function_of_seed_and_step():
    mixes = [of(step, mixup=0.4) for step in range(50)]
    assert mixes == [of(step, mixup=0.4) for step in range(50)]
    assert len({mix.share for mix in mixes}) == 50
    assert choose_mix(DataConfig(mixup=0.4), seed=4, step=0, size=20) != mixes[0]
    assert of(0) == Mix()


def test_shares_are_those_of_the_beta_distribution():
    shares = torch.tensor([of(step, mixup=0.2).share for step in range(600)])
    assert shares.min() >= 0.5
    assert (shares - 0.5).square().mean().item() == pytest.approx(0.04 / (0.4**2 * 1.4), rel=0.1)


def test_with_both_each_step_takes_one_and_each_as_often():
    boxes = sum(of(step, mixup=0.2, cutmix=1.0).box is not None for step in range(300))
    assert 120 < boxes < 180


@given(step=st.integers(0, 10**6))
def test_a_box_is_within_the_image_and_as_large_as_what_is_not_its_own(step):
    mix = of(step, cutmix=1.0)
    sides = [axis.stop - axis.start for axis in mix.box]
    assert 0 <= sides[0] == sides[1] <= 20
    assert all(axis.start >= 0 and axis.stop <= 20 for axis in mix.box)
    assert mix.share == pytest.approx(1 - sides[0] ** 2 / 400)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("num", [0, 1, 2, 5, 6])
def test_neighbours_are_mixed_and_of_an_odd_number_the_first_stays(num, layout):
    images = torch.rand(num, 3, 4, 4).contiguous(memory_format=layout)
    first, partners = num % 2, list(range(num))
    for place in range(first, num, 2):
        partners[place], partners[place + 1] = place + 1, place
    assert with_partners(torch.arange(num)).tolist() == partners
    mixed = Mix(share=0.3).images(images)
    torch.testing.assert_close(mixed, 0.3 * images + 0.7 * images[partners])
    assert mixed.is_contiguous(memory_format=layout)
    cut = Mix(share=0.75, box=(slice(0, 2), slice(1, 3))).images(images)
    expected = images.clone()
    expected[:, :, 0:2, 1:3] = images[partners][:, :, 0:2, 1:3]
    assert torch.equal(cut, expected)


def test_the_mean_of_losses_is_the_loss_of_the_soft_label():
    logits, labels, mix = torch.randn(6, 4), torch.randint(4, (6,)), Mix(share=0.3)
    found = mix.mean(lambda targets: functional.cross_entropy(logits, targets, label_smoothing=0.1), labels)
    soft = 0.3 * functional.one_hot(labels, 4) + 0.7 * functional.one_hot(with_partners(labels), 4)
    assert found.item() == pytest.approx(functional.cross_entropy(logits, soft, label_smoothing=0.1).item(), rel=1e-6)


def test_each_of_two_classes_is_right_by_its_share(one_rank):
    totals, labels = TrainTotals(torch.device("cpu")), torch.tensor([0, 1, 2, 2])
    logits = torch.eye(8)[[0, 0, 2, 3]]
    totals.add(count(torch.tensor(1.0), logits, labels, Mix(share=0.75)))
    assert means(totals.reduce())["top1"] == pytest.approx((0.75 + 0.25 + 1 + 0) / 4)


@settings(max_examples=60)
@given(data=st.data(), num=st.integers(1, 90), size=st.integers(2, 40))
def test_pairs_stay_together_however_a_step_is_dealt_and_memory_runs_out(data, num, size):
    sizes = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple))

    def partners(sizes, *, halved=False):
        dealt = Batching(batch_sizes=sizes, shares=sizes, global_batch_size=size)
        plan, found = Schedule(seed=0, num_samples=num, batching=dealt, pairs=True), {}
        for rank in range(len(sizes)):
            for step in plan.steps(rank, epoch=0, offset=0, end_epoch=1):
                for batch in step.micro_batches:
                    assert len(batch) <= max(sizes[rank], 3)
                    assert len(batch) != 1 or num == 1
                    bounds = [0, *accumulate(_halves(len(batch)) if halved and len(batch) > 2 else [len(batch)])]
                    for piece in (torch.tensor(batch[a:b]) for a, b in pairwise(bounds)):
                        found |= dict(zip(piece.tolist(), with_partners(piece).tolist(), strict=True))
        return found

    alone = partners((100,))
    assert partners(sizes) == alone
    assert partners(sizes, halved=True) == alone
    assert sorted(alone) == list(range(num))
