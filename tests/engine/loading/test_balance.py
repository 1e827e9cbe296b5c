"""Classes of different sizes: as pure functions, and in real trainings."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.engine import losses
from launcher.engine.device import Device
from launcher.engine.distributed import Ranks
from launcher.engine.loading.balance import (
    SampleWeights,
    balanced_order,
    class_weights,
    describe,
    weights_in_loss,
)
from launcher.engine.schedule import Batching, Schedule
from launcher.engine.setup import build_parts
from launcher.errors import TrainingError
from launcher.recipe.schema_train import TrainConfig

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60)
few = settings(max_examples=40)


@few
@given(labels=LABELS, seed=st.integers(0, 2**40), epoch=st.integers(0, 20))
def test_an_epoch_sees_each_class_as_often_as_any_other_but_for_one(labels, seed, epoch):
    indices, before = balanced_order(seed, epoch, labels)
    assert len(indices) == len(labels)
    seen = Counter(labels[index] for index in indices.tolist())
    assert max(seen.values()) - min(seen[label] for label in set(labels)) <= 1
    assert sorted(zip(indices.tolist(), before.tolist(), strict=True)) == sorted(
        (index, time) for index, times in Counter(indices.tolist()).items() for time in range(times)
    )
    again, _ = balanced_order(seed, epoch, labels)
    assert again.tolist() == indices.tolist()


@few
@given(labels=LABELS, epochs=st.integers(1, 12))
def test_over_all_epochs_the_samples_of_a_class_take_turns(labels, epochs):
    seen = Counter(index for epoch in range(epochs) for index in balanced_order(3, epoch, labels)[0].tolist())
    for label in set(labels):
        times = [seen[index] for index, of in enumerate(labels) if of == label]
        assert max(times) - min(times) <= 1
    totals = [sum(seen[i] for i, of in enumerate(labels) if of == label) for label in set(labels)]
    assert max(totals) - min(totals) <= 1


def test_the_order_is_the_same_for_ever_and_another_in_each_epoch():
    labels = [0] * 9 + [1] * 2 + [2]
    orders = [balanced_order(5, epoch, labels)[0].tolist() for epoch in range(3)]
    assert orders[0] == [11, 11, 8, 9, 1, 5, 10, 6, 9, 11, 10, 11]
    assert len({tuple(order) for order in orders}) == 3


@few
@given(labels=LABELS, data=st.data(), size=st.integers(1, 20))
def test_ranks_part_it_and_a_resume_goes_on_in_it(labels, data, size):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    excluded = data.draw(st.frozensets(st.integers(0, len(labels) - 1), max_size=3))
    dealt = Batching(batch_sizes=sizes, shares=sizes, global_batch_size=size)
    plan = Schedule(seed=1, num_samples=len(labels), batching=dealt, labels=tuple(labels), excluded=excluded)

    def taken(plan, *, offset=0):
        ranks = [list(plan.steps(r, epoch=2, offset=offset, end_epoch=3)) for r in range(len(plan.batching.shares))]
        return [
            ([position for step in steps for batch in step.positions for position in batch], steps[0].end)
            for steps in zip(*ranks, strict=True)
        ]

    whole = taken(plan)
    expected = [(2 + (time << 32), i) for i, time in zip(*map(list, balanced_order(1, 2, labels)), strict=True)]
    flat = [position for positions, _ in whole for position in positions]
    assert flat == [position for position in expected if position[1] not in excluded]
    if whole:
        stopped = data.draw(st.integers(0, len(whole) - 1))
        other = replace(plan, batching=Batching(batch_sizes=(3, 4), shares=(3, 4), global_batch_size=size))
        rest = taken(other, offset=whole[stopped - 1][1] if stopped else 0)
        assert [positions for positions, _ in rest] == [positions for positions, _ in whole[stopped:]]


def test_weights_make_classes_count_alike_and_all_samples_as_much_as_before():
    weights = class_weights([6, 3, 0, 1])
    assert [count * weight for count, weight in zip([6, 3, 0, 1], weights, strict=True)] == pytest.approx(
        [10 / 3, 10 / 3, 0, 10 / 3]
    )


def test_with_weights_of_a_list_too_classes_count_alike_and_the_loss_keeps_its_scale():
    given, labels, cpu = [1.0] * 10 + [0.1] * 990, [0] * 10 + [1] * 990, Device(type="cpu")
    of_class = weights_in_loss(labels, frozenset({0}), num_classes=3, several=False, given=given)
    weights = SampleWeights(given, frozenset({0}), cpu).of(range(1, 1000)).tolist()
    counted = [weight * of_class[label] for weight, label in zip(weights, labels[1:], strict=True)]
    assert sum(counted) / 999 == pytest.approx(1)
    assert sum(counted[:9]) == pytest.approx(sum(counted[9:]))
    sets = [(0,)] * 10 + [()] * 990
    (positive,) = weights_in_loss(sets, frozenset({0}), num_classes=1, several=True, given=given)
    assert positive * sum(weights[:9]) == pytest.approx(sum(weights[9:]))


def test_weights_of_a_list_have_a_mean_of_one_over_what_is_seen_evenly():
    given, labels, cpu = [1.0] * 10 + [0.1] * 990, [0] * 10 + [1] * 990, Device(type="cpu")
    weights = SampleWeights(given, frozenset({0}), cpu, evenly=labels)
    orders = [[i for i in balanced_order(3, epoch, labels)[0].tolist() if i] for epoch in range(4)]
    assert [weights.of(order).mean().item() for order in orders] == pytest.approx([1] * 4, rel=0.02)


def test_a_class_that_every_image_has_counts_as_it_is():
    labels = [(0, 1), (0,), (0, 1), (0, 1)]
    assert weights_in_loss(labels, frozenset(), num_classes=3, several=True) == pytest.approx([1, 1 / 3, 1])


def test_a_loss_is_weighed_in_training_only_and_a_mean_cannot_be():
    logits, targets, cpu = torch.randn(4, 3), torch.tensor([0, 1, 2, 2]), torch.device("cpu")
    loss = losses.build_loss(TrainConfig(), num_classes=3, device=cpu, weights=[1.0, 2.0, 0.5])
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = (each * torch.tensor([1.0, 2.0, 0.5, 0.5])).sum().item()
    assert loss.sum(logits, targets, training=True).item() == pytest.approx(expected, rel=1e-6)
    assert loss.sum(logits, targets, training=False).item() == pytest.approx(each.sum().item(), rel=1e-6)
    mean = losses.Loss("mean", torch.nn.functional.cross_entropy, {}, torch.ones(3))
    with pytest.raises(TrainingError, match="return the loss of each sample"):
        mean.sum(logits, targets, training=True)


def test_the_classes_are_told():
    counts = {"bee": 1200, "cat": 3}
    assert describe(counts, "none") == "1,203 training images in 2 classes: bee 1,200, cat 3"
    assert describe(counts, "weights").endswith("; losses are weighed by class (data.balance)")
    many = describe({f"class {i}": i + 1 for i in range(100)}, "sampler")
    assert "in 100 classes: 1 to 100 in each, the median is 51; each class is seen as often" in many


def test_a_sample_that_comes_again_in_an_epoch_is_augmented_in_another_way(make_run, engine, one_rank, tmp_path):
    folder = engine.write_images(tmp_path / "skewed", train=14, val=2, classes=["a", "b"])
    for file in list((folder / "train" / "b").iterdir())[1:]:
        file.unlink()
    run = make_run(data={"path": str(folder), "augment": "standard", "balance": "sampler"}, batch={"size": 4})
    parts = build_parts(run, Ranks(), engine.cpu)
    batches = list(parts.train_loader(0, 0))
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist().count(1) == 4  # of 8
    images = torch.cat([images for images, _ in batches])[labels == 1]
    assert len({image.numpy().tobytes() for image in images}) == 4
