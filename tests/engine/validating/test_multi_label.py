"""Several classes an image: counted as torchmetrics counts, and the same on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torchmetrics.functional import classification

from launcher.engine.losses import Loss, binary_cross_entropy
from launcher.engine.validating import ranking
from launcher.engine.validating.multi_label import MultiLabelTotals

CPU = torch.device("cpu")
NAMES = [str(number) for number in range(7)]
THRESHOLD = 0.4


def answers(num):
    generator = torch.Generator().manual_seed(3)
    targets = (torch.rand(num, len(NAMES), generator=generator) < 0.3).float()
    return 2 * torch.randn(num, len(NAMES), generator=generator) + 2 * targets - 1, targets


def counted(logits, targets, sizes):
    return counted_totals(logits, targets, sizes).found


def counted_totals(logits, targets, sizes):
    """What counted, with what it came to as ``found``."""
    loss = Loss("binary_cross_entropy", binary_cross_entropy, {}, independent=True)
    totals = MultiLabelTotals(NAMES, CPU, loss, threshold=THRESHOLD)
    for part, own in zip(logits.split(sizes), targets.split(sizes), strict=True):
        totals.add(part, own)
    totals.found = totals.compute()
    return totals


def test_each_metric_is_torchmetrics_own(one_rank):
    logits, targets = answers(80)
    found, sets, probabilities = counted(logits, targets, [80]), targets.long(), logits.sigmoid()
    options = {"num_labels": len(NAMES)}
    for name, average in (("f1", "macro"), ("f1_micro", "micro"), ("f1_weighted", "weighted")):
        value = classification.multilabel_f1_score(probabilities, sets, average=average, threshold=THRESHOLD, **options)
        assert found[name] == pytest.approx(float(value), abs=1e-6), name
    assert found["average_precision"] == pytest.approx(
        float(classification.multilabel_average_precision(probabilities, sets, **options)), abs=1e-6
    )
    assert found["auroc"] == pytest.approx(
        float(classification.multilabel_auroc(probabilities, sets, **options)), abs=1e-6
    )
    loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 80
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    likeliest = targets.gather(1, logits.argmax(1, keepdim=True))
    assert found["top1"] == pytest.approx(float(likeliest.mean()))
    assert sum(row["samples"] for row in found["per_class"].values()) == int(targets.sum())


@pytest.mark.parametrize("limit", [1 << 20, 100])
def test_ranks_come_to_the_very_numbers_of_one(in_ranks, monkeypatch, limit):
    monkeypatch.setattr(ranking, "EXACT_SCORES", limit)
    logits, targets = answers(90)

    def work(ranks):
        own = {1: [90], 3: [40, 0, 50]}[ranks.world_size]
        return counted(logits.split(own)[ranks.rank], targets.split(own)[ranks.rank], own[ranks.rank] or 1)

    (one,), many = in_ranks(1, work), in_ranks(3, work)
    for found in (one, *many):
        found["loss"] = round(found["loss"], 6)
    assert many == [one] * 3


def test_having_a_class_counts_by_the_weight_of_it(one_rank):
    logits, targets = answers(10)
    weights = torch.arange(1.0, 8.0)
    loss = Loss("bce", binary_cross_entropy, {}, weights, independent=True)
    expected = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="sum")
    assert float(loss.sum(logits, targets, training=True)) == pytest.approx(float(expected))
    plain = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    assert float(loss.sum(logits, targets, training=False)) == pytest.approx(float(plain))
