"""Losses of ours, and that a loss is one function and one row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from launcher.engine import losses
from launcher.errors import TrainingError
from launcher.recipe import user_code
from launcher.recipe.schema_train import TrainConfig

CPU = torch.device("cpu")


def samples(num=9, classes=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, classes, generator=generator), torch.randint(classes, (num,), generator=generator)


def build(loss, **config):
    return losses.build_loss(TrainConfig(loss=loss, **config), num_classes=5, device=CPU)


def by_hand(name, logits, targets, *, smoothing=0.0, gamma=2.0):
    """One sample after the other, in double precision."""
    found = []
    for row, target in zip(logits.double(), targets.tolist(), strict=True):
        wanted = torch.full_like(row, smoothing / len(row))
        wanted[target] += 1 - smoothing
        if name == "binary_cross_entropy":
            right, wrong = functional.logsigmoid(row), functional.logsigmoid(-row)
            found.append(-(wanted * right + (1 - wanted) * wrong).sum())
        else:
            logs = row - row.logsumexp(0)
            factor = (1 - logs[target].exp()) ** gamma if name == "focal" else 1.0
            found.append(-(wanted * logs).sum() * factor)
    return torch.stack(found)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_of_ours_is_that_by_hand_for_each_sample(name):
    logits, targets = samples()
    found = losses.LOSSES[name](logits, targets)
    assert found.shape == (9,)
    assert torch.allclose(found.double(), by_hand(name, logits, targets), atol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy"])
def test_labels_are_smoothed_in_training_only(name):
    logits, targets = samples()
    loss = build(name, label_smoothing=0.2)
    found = [loss.sum(logits, targets, training=training).item() for training in (True, False)]
    expected = [by_hand(name, logits, targets, smoothing=smoothing).sum().item() for smoothing in (0.2, 0.0)]
    assert found == pytest.approx(expected, rel=1e-6)


def test_arguments_reach_it():
    logits, targets = samples()
    found = build("focal", loss_args={"gamma": 0.5}).sum(logits, targets, training=True).item()
    assert found == pytest.approx(by_hand("focal", logits, targets, gamma=0.5).sum().item(), rel=1e-6)


@pytest.mark.parametrize("name", losses.LOSSES)
@given(cut=st.integers(0, 9))
def test_sums_over_samples_add_up_however_they_are_dealt(name, cut):
    logits, targets = samples()
    loss = build(name)
    parts = [loss.sum(logits[part], targets[part], training=False) for part in (slice(cut), slice(cut, None))]
    assert sum(parts).item() == pytest.approx(loss.sum(logits, targets, training=False).item(), rel=1e-6)


def test_the_loss_of_a_sample_counts_by_its_weight_and_that_of_its_class():
    logits, targets = samples()
    weights = torch.arange(9.0) / 4
    loss = losses.build_loss(TrainConfig(), num_classes=5, device=CPU, weights=[1.0, 2.0, 3.0, 4.0, 5.0])
    by_class = 1.0 + targets
    expected = (by_hand("cross_entropy", logits, targets) * weights * by_class).sum().item()
    assert loss.sum(logits, targets, weights, training=True).item() == pytest.approx(expected, rel=1e-6)
    mean = losses.Loss("mine", functional.cross_entropy, {})
    with pytest.raises(TrainingError, match="mine returned a mean over samples, which cannot be weighed by the list's"):
        mean.sum(logits, targets, weights, training=True)


def test_the_names_are_known_without_importing_the_file():
    assert list(user_code.seam("train.loss").names) == list(losses.LOSSES)


def test_no_sample_has_a_loss_of_zero_and_a_gradient():
    """A rank whose share is empty still takes part in DDP."""
    logits = torch.randn(0, 5, requires_grad=True)
    found = build("cross_entropy").sum(logits, torch.empty(0, dtype=torch.int64), training=True)
    found.backward()
    assert found.item() == 0.0


def test_a_mean_counts_for_as_many_samples():
    logits, targets = samples()
    loss = losses.Loss("mean", functional.cross_entropy, {})
    expected = functional.cross_entropy(logits, targets, reduction="sum").item()
    assert loss.sum(logits, targets, training=True).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x, y: 1.0, "returned float"),
        (lambda x, y: x, r"shape \(9, 5\) for 9 samples"),
        (lambda x, y: functional.cross_entropy(x, y, reduction="none")[:3], r"shape \(3,\) for 9 samples"),
        (lambda x, y: x.argmax(1) == y, "torch.bool"),
        (lambda x, y: functional.cross_entropy(x.detach(), y), "no gradient"),
    ],
)
def test_what_is_no_loss_is_named(function, words):
    logits, targets = samples()
    loss = losses.Loss("my.py:loss", function, {})
    with pytest.raises(TrainingError, match=rf"train\.loss: my\.py:loss.*{words}"):
        loss.sum(logits.requires_grad_(), targets, training=True)


def test_a_class_of_torch_gives_each_sample_its_loss():
    """Its mean over weights would differ with how a step is dealt out."""
    logits, targets = samples()
    loss = build("torch.nn:CrossEntropyLoss", loss_args={"label_smoothing": 0.1})
    assert loss.call(logits, targets, training=True).shape == (9,)
