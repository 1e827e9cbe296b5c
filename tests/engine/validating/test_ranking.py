"""AUROC, average precision and calibration: torchmetrics' and scikit-learn's own, the same on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    precision_recall_curve,
    precision_score,
    roc_auc_score,
)
from torchmetrics.functional.classification import (
    multiclass_auroc,
    multiclass_average_precision,
    multiclass_calibration_error,
)

from launcher.engine.losses import Loss, cross_entropy
from launcher.engine.validating import ranking
from launcher.engine.validating.ranking import Ranking
from launcher.engine.validating.totals import ValidationTotals

CPU = torch.device("cpu")
CLASSES = 6


def answers(num, classes=CLASSES, seed=0):
    """Logits that have something to do with their labels, of which the last class has none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(max(2, classes - 1), (num,), generator=generator)
    logits = 1.5 * torch.randn(num, classes, generator=generator)
    logits[torch.arange(num), labels] += 1.0
    return logits, labels


def totals_of(logits, labels):
    totals = ValidationTotals([str(i) for i in range(logits.shape[1])], CPU, Loss("cross_entropy", cross_entropy, {}))
    totals.add(logits, labels)
    return totals


def test_a_curve_has_the_highest_precision_of_at_least_each_recall(one_rank):
    logits, labels = answers(200)
    probabilities = logits.softmax(1)
    made = Ranking(CLASSES, CPU)
    made.add(probabilities, labels)
    made.compute()
    for label in range(CLASSES - 1):
        precision, recall, _ = precision_recall_curve(labels.numpy() == label, probabilities[:, label].numpy())
        wanted = [
            precision[:-1][recall[:-1] >= least - 1e-9].max() for least in np.linspace(0, 1, ranking.CURVE_POINTS)
        ]
        assert made.curves[label].numpy() == pytest.approx(np.array(wanted), abs=1e-9)
    assert made.curves[-1].isnan().all()  # there are no images of it


def test_every_metric_is_that_of_others(one_rank):
    logits, labels = answers(400)
    found = totals_of(logits, labels).compute()
    probabilities, predicted = logits.softmax(1), logits.argmax(1).numpy()
    true, occur = labels.numpy(), range(CLASSES - 1)
    one_of = [(true == label, probabilities[:, label].numpy()) for label in occur]
    assert found["ranking"] == "exact"
    assert found["auroc"] == pytest.approx(np.mean([roc_auc_score(*each) for each in one_of]), abs=1e-6)
    precision = np.mean([average_precision_score(*each) for each in one_of])
    assert found["average_precision"] == pytest.approx(precision, abs=1e-6)
    error = multiclass_calibration_error(probabilities, labels, num_classes=CLASSES, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(error), abs=1e-6)
    for name, average in (("f1", "macro"), ("f1_micro", "micro"), ("f1_weighted", "weighted")):
        assert found[name] == pytest.approx(f1_score(true, predicted, average=average), abs=1e-9), name
    assert found["precision"] == pytest.approx(precision_score(true, predicted, average="macro"), abs=1e-9)
    recalls = [(predicted[true == label] == label).mean() for label in occur]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-9)
    if set(predicted) <= set(true):
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))


@pytest.mark.parametrize("limit", [1 << 20, 100])
def test_ranks_come_to_the_very_numbers_of_one(in_ranks, monkeypatch, limit):
    monkeypatch.setattr(ranking, "EXACT_SCORES", limit)
    logits, labels = answers(90)

    def work(ranks):
        own = {1: [90], 3: [40, 0, 50]}[ranks.world_size]
        totals = totals_of(logits[:0], labels[:0])
        for part, of in zip(
            logits.split(own)[ranks.rank].split(7), labels.split(own)[ranks.rank].split(7), strict=True
        ):
            totals.add(part, of)
        return totals.compute()

    (one,), many = in_ranks(1, work), in_ranks(3, work)
    assert one["ranking"] == ("exact" if limit > 1000 else "512 bins")
    for found in (one, *many):
        assert found.pop("loss") == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert many == [one] * 3
    assert all(math.isfinite(one[name]) for name in ("auroc", "average_precision", "ece"))


@pytest.mark.parametrize("classes", [2, 50])
def test_what_is_counted_in_bins_is_nearly_exact(one_rank, monkeypatch, classes):
    logits, labels = answers(2000, classes)
    exact = totals_of(logits, labels).compute()
    monkeypatch.setattr(ranking, "EXACT_SCORES", 1000)
    binned = totals_of(logits, labels).compute()
    assert binned["ranking"] == "512 bins"
    assert binned["auroc"] == pytest.approx(exact["auroc"], abs=1e-3)
    assert binned["average_precision"] == pytest.approx(exact["average_precision"], abs=3e-3)


@pytest.mark.filterwarnings("ignore:No positive samples")
def test_equal_probabilities_count_as_torchmetrics_counts_them(one_rank):
    logits, labels = answers(300)
    logits = logits.round()
    found = totals_of(logits, labels).compute()
    options = {"num_classes": CLASSES, "average": None}
    occur = slice(CLASSES - 1)
    probabilities = logits.softmax(1)
    area = multiclass_auroc(probabilities, labels, **options)[occur].mean()
    precision = multiclass_average_precision(probabilities, labels, **options)[occur].mean()
    assert found["auroc"] == pytest.approx(float(area), abs=1e-6)
    assert found["average_precision"] == pytest.approx(float(precision), abs=1e-6)


def test_memory_does_not_grow_with_images(one_rank, monkeypatch):
    monkeypatch.setattr(ranking, "EXACT_SCORES", 10_000)
    found = Ranking(100, CPU)
    for number in range(20):
        logits, labels = answers(60, 100, seed=number)
        found.add(logits.softmax(1), labels)
        held = sum(each.numel() for pair in found._kept for each in pair)
        assert held <= 10_000 + 100
    assert found._binned.numel() == 100 * 512 * 2
    assert int(found._binned[0].sum()) == 1200 - 60 * len(found._kept)


def test_one_class_alone_has_none(one_rank):
    logits = torch.randn(9, 3)
    found = totals_of(logits, torch.zeros(9, dtype=torch.int64)).compute()
    assert math.isnan(found["auroc"])
    assert found["average_precision"] == 1.0
