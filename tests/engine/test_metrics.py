from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.engine.losses import Loss, cross_entropy
from launcher.engine.metrics import BestMetric, TrainTotals, count, means
from launcher.engine.validating.ranking import CURVE_POINTS
from launcher.engine.validating.totals import ValidationTotals

CPU = torch.device("cpu")
LOSS = Loss("cross_entropy", cross_entropy, {})
NAMES = ["a", "b", "c", "d", "e", "f", "g"]


def predictions(num, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, classes, generator=generator), torch.randint(classes, (num,), generator=generator)


def expected_counts(logits, labels):
    """By hand, one sample after the other."""
    classes = logits.shape[1]
    confusion = np.zeros((classes, classes), int)
    top5 = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        ranked = sorted(range(classes), key=lambda c: -row[c])
        confusion[label, ranked[0]] += 1
        top5 += label in ranked[:5]
    return confusion, top5


def f1_of(confusion):
    true, predicted, hits = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    return [2 * h / (t + p) if t + p else 0.0 for h, t, p in zip(hits, true, predicted, strict=True)]


def by_hand(confusion, names):
    """Each class's figures."""
    return {
        name: {
            "recall": hits / true if true else 0.0,
            "precision": hits / predicted if predicted else 0.0,
            "f1": 2 * hits / (true + predicted) if true + predicted else 0.0,
            "samples": true,
        }
        for name, hits, true, predicted in zip(
            names, *(c.tolist() for c in (confusion.diagonal(), confusion.sum(1), confusion.sum(0))), strict=True
        )
    }


def validated(logits, labels, sizes, names=NAMES):
    totals = ValidationTotals(names, CPU, LOSS)
    for part, own in zip(logits.split(sizes), labels.split(sizes), strict=True):
        totals.add(part, own)
    return totals.compute()


def test_validation_counts_are_those_counted_by_hand(one_rank):
    logits, labels = predictions(90, 7)
    confusion, top5 = expected_counts(logits, labels)
    found = validated(logits, labels, [90])
    assert found["confusion"] == confusion.tolist()
    assert found["samples"] == 90
    assert found["top1"] == confusion.trace() / 90
    assert found["top5"] == pytest.approx(top5 / 90, abs=1e-7)
    assert found["f1"] == pytest.approx(np.mean(f1_of(confusion)), abs=1e-6)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits.double(), labels).item(), abs=1e-6)
    assert found["per_class"] == by_hand(confusion, NAMES)
    json.dumps(found, allow_nan=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # one group for all of them will do
@given(cuts=st.lists(st.integers(1, 39), unique=True, max_size=8).map(sorted))
def test_they_are_the_same_however_the_samples_come_in_batches(one_rank, cuts):
    logits, labels = predictions(40, 7)
    bounds = [0, *cuts, 40]
    sizes = [b - a for a, b in pairwise(bounds)]
    whole, parts = (validated(logits, labels, s) for s in ([40], sizes))
    assert parts.pop("loss") == pytest.approx(whole.pop("loss"), rel=1e-6)
    assert parts == whole


@pytest.mark.parametrize("classes", [2, 3])
def test_fewer_classes_than_five_are_all_in_the_top_5(one_rank, classes):
    logits, labels = predictions(20, classes)
    found = validated(logits, labels, [20], NAMES[:classes])
    assert found["top5"] == 1.0
    assert found["top1"] < 1.0


def test_half_precision_logits_are_counted_alike(one_rank):
    logits, labels = predictions(50, 7)
    half = logits.bfloat16()
    assert validated(half, labels, [50])["confusion"] == validated(half.float(), labels, [50])["confusion"]


def test_a_class_without_samples_or_predictions_has_zeros(one_rank):
    logits = torch.tensor([[5.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    found = validated(logits, torch.tensor([0, 1]), [2], ["a", "b", "c"])["per_class"]
    assert found == {
        "a": {"recall": 1.0, "precision": 0.5, "f1": 2 / 3, "samples": 1},
        "b": {"recall": 0.0, "precision": 0.0, "f1": 0.0, "samples": 1},
        "c": {"recall": 0.0, "precision": 0.0, "f1": 0.0, "samples": 0},
    }


@pytest.mark.parametrize(("num", "detailed"), [(100, True), (101, False)])
def test_above_a_hundred_classes_the_details_are_left_out(one_rank, num, detailed):
    logits, labels = predictions(150, num)
    found = validated(logits, labels, [150], [str(i) for i in range(num)])
    assert ("confusion" in found, "per_class" in found, "mistakes" in found) == (detailed, detailed, not detailed)
    assert found["samples"] == 150


def many_classes(num_classes, num, seed=0):
    """Logits of a model that is mostly right, and labels of few of the classes: the same confusion comes often."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, num_classes, generator=generator)
    labels = torch.randint(12, (num,), generator=generator) * 7
    said = labels + (torch.rand(num, generator=generator) < 0.3) * 3
    logits[torch.arange(num), said] += 20.0
    return logits, labels


def test_of_many_classes_the_counts_are_those_counted_by_hand(one_rank):
    logits, labels = many_classes(300, 500)
    confusion, top5 = expected_counts(logits, labels)
    found = validated(logits, labels, [200, 300], [f"class {i}" for i in range(300)])
    assert found["top1"] == confusion.trace() / 500
    assert found["top5"] == top5 / 500
    occur = confusion.sum(0) + confusion.sum(1) > 0
    assert found["f1"] == pytest.approx(np.mean(np.array(f1_of(confusion))[occur]), abs=1e-9)
    wrong = confusion - np.diag(confusion.diagonal())
    order = sorted(np.argwhere(wrong).tolist(), key=lambda pair: (-wrong[tuple(pair)], pair))[:10]
    assert found["mistakes"] == [
        {"true": f"class {t}", "predicted": f"class {p}", "count": int(wrong[t, p])} for t, p in order
    ]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("num_classes", [7, 300])
def test_all_ranks_come_to_the_integers_of_one(in_ranks, num_classes):
    names = [str(i) for i in range(num_classes)]
    logits, labels = many_classes(300, 90)
    logits, labels = logits[:, :num_classes].contiguous(), labels % num_classes

    def work(ranks):
        own = {1: [90], 3: [40, 0, 50]}[ranks.world_size]
        totals = ValidationTotals(names, CPU, LOSS)
        if own[ranks.rank]:
            totals.add(logits.split(own)[ranks.rank], labels.split(own)[ranks.rank])
        return totals.compute()

    (one,), many = in_ranks(1, work), in_ranks(3, work)
    for found in [one, *many]:
        assert found.pop("loss") == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert str(many) == str([one] * 3)  # NaN, as of AUROC where all images are of one class, equals nothing


def test_ten_thousand_classes_cost_no_square_of_them(one_rank):
    names, (logits, labels) = [str(i) for i in range(10_000)], many_classes(10_000, 32)
    largest = 0

    class Watch(TorchDispatchMode):
        """Looks at the size of every tensor that is made."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            for each in made if isinstance(made, tuple | list) else [made]:
                if isinstance(each, torch.Tensor):
                    largest = max(largest, each.numel())
            return made

    with Watch():
        found = validated(logits, labels, [32], names)
    assert found["samples"] == 32
    assert largest <= max(logits.numel(), CURVE_POINTS * len(names))


def test_above_a_hundred_classes_it_stands_there_how_the_answers_lie(one_rank):
    logits, labels = predictions(300, 101)
    logits[:200, 7] = 100.0
    found = validated(logits, labels, [100, 200], [str(i) for i in range(101)])["answers"]
    predicted = logits.argmax(1)
    assert found["most"] == "7"
    assert (found["count"], found["true"]) == (int((predicted == 7).sum()), int((labels == 7).sum()))
    assert found["hits"] == int(((predicted == 7) & (labels == 7)).sum())
    chance = sum(int((labels == i).sum()) * int((predicted == i).sum()) for i in range(101)) / 300**2
    assert found["chance"] == pytest.approx(chance)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:Encountered")
def test_a_loss_that_is_no_number_is_not_reported_as_one(one_rank, value):
    logits, labels = predictions(20, 7)
    logits[3] = value
    totals = ValidationTotals(NAMES, CPU, LOSS)
    totals.add(logits[:10], labels[:10])
    totals.add(logits[10:], labels[10:])
    assert not math.isfinite(totals.compute()["loss"])


# Training


def test_training_sums_are_those_counted_by_hand(one_rank):
    totals = TrainTotals(CPU)
    logits, labels = predictions(60, 7)
    confusion, top5 = expected_counts(logits, labels)
    for part, own in zip(logits.split([25, 35, 0]), labels.split([25, 35, 0]), strict=True):
        totals.add(count(torch.nn.functional.cross_entropy(part, own, reduction="sum"), part, own))
    assert totals.reduce() == pytest.approx(
        (torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item(), confusion.trace(), top5, 60)
    )
    found = means(totals.reduce())
    assert found["samples"] == 60
    assert found["top1"] == confusion.trace() / 60
    totals.reset()
    assert totals.reduce() == (0, 0, 0, 0)
    assert means(totals.reduce()) == {"samples": 0, "loss": 0, "top1": 0, "top5": 0}


def test_restored_sums_go_on_and_are_not_changed_by_reducing(one_rank):
    totals = TrainTotals(CPU)
    totals.restore((10.5, 3, 5, 8))
    logits, labels = torch.tensor([[9.0, 1.0], [9.0, 1.0]]), torch.tensor([0, 1])
    totals.add(count(torch.tensor(2.0), logits, labels))
    assert totals.reduce() == totals.reduce() == (12.5, 4, 7, 10)


def test_sums_of_all_ranks_come_together(in_ranks):
    def work(ranks):
        totals = TrainTotals(CPU)
        if ranks.rank == 0:
            totals.restore((100, 10, 20, 30))
        logits, labels = predictions(ranks.rank * 5, 7, seed=ranks.rank)  # rank 0 has none
        totals.add(count(logits.sum() * 0 + ranks.rank, logits, labels))
        first = totals.reduce()
        assert totals.reduce() == first  # a checkpoint adds them up in the middle of an epoch
        return first

    top1 = top5 = 0
    for rank in (1, 2):
        confusion, hits = expected_counts(*predictions(rank * 5, 7, seed=rank))
        top1, top5 = top1 + int(confusion.trace()), top5 + hits
    assert in_ranks(3, work) == [(103, 10 + top1, 20 + top5, 45)] * 3


# The best so far


def course(values, **options):
    """What BestMetric said of each value: (best so far, exhausted)."""
    best = BestMetric(metric="val/x", **{"mode": "min", "min_delta": 0.0, "patience": 2, **options})
    return [(best.update(v, epoch=i, step=10 * i), best.exhausted) for i, v in enumerate(values)], best


def test_less_is_better_with_min_and_more_with_max():
    values = [3.0, 2.0, 2.5, 1.0]
    found, best = course(values)
    assert [new for new, _ in found] == [True, True, False, True]
    assert best.best == {"metric": "val/x", "value": 1.0, "epoch": 3, "step": 30}
    found, best = course([-v for v in values], mode="max")
    assert [new for new, _ in found] == [True, True, False, True]
    assert best.best["value"] == -1.0


def test_patience_counts_epochs_since_the_best():
    found, _ = course([1.0, 2.0, 0.5, 0.6, 0.5, 0.4])
    assert found == [(True, False), (False, False), (True, False), (False, False), (False, True), (True, False)]
    found, _ = course([1.0, 2.0], patience=1)
    assert found == [(True, False), (False, True)]
    found, best = course([1.0] * 50, patience=None)
    assert not any(exhausted for _, exhausted in found)
    assert best.best["epoch"] == 0


def test_better_means_by_more_than_min_delta():
    found, best = course([1.0, 0.95, 0.89, 0.8], min_delta=0.1)
    assert [new for new, _ in found] == [True, False, True, False]
    assert best.best["value"] == 0.89
    found, _ = course([0.5, 0.55, 0.75], mode="max", min_delta=0.1)
    assert [new for new, _ in found] == [True, False, True]


def test_it_goes_on_from_its_state_through_json():
    values = [3.0, 2.0, 2.0, 2.1, 1.9, 2.0, 2.0]
    whole, _ = course(values)
    _, first = course(values[:3])
    second = BestMetric(metric="val/x", mode="min", min_delta=0.0, patience=2)
    second.restore(json.loads(json.dumps(first.state())))
    rest = [(second.update(v, epoch=i, step=0), second.exhausted) for i, v in enumerate(values[3:], start=3)]
    assert rest == whole[3:]


def test_any_number_is_better_than_none():
    found, best = course([math.nan, math.nan, 2.0, math.nan])
    assert found[2] == (True, False)
    assert best.best["value"] == 2.0
    assert found[3] == (False, False)
