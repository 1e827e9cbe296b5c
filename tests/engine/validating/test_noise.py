"""A best epoch that beats the former one by chance, it may be, is called so."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from launcher.engine.losses import Loss
from launcher.engine.metrics import hits_of
from launcher.engine.validating import noise as noises
from launcher.engine.validating import redraw
from launcher.engine.validating.multi_label import MultiLabelTotals
from launcher.engine.validating.noise import Answers, Noise
from launcher.engine.validating.totals import ValidationTotals
from launcher.recipe.metrics import METRICS

CLASSES = 3


class Recorder:
    def __init__(self):
        self.events, self.lines = [], []

    def event(self, kind, **fields):
        self.events.append({"kind": kind, **fields})

    def say(self, line):
        self.lines.append(line)


def answers(right, num=200, *, losses=None, share="same"):
    """Images of three classes in turn, of which the first ``right`` are answered rightly."""
    true = torch.arange(num) % CLASSES
    predicted = torch.where(torch.arange(num) < right, true, (true + 1) % CLASSES)
    return Answers(share=share, samples=num, num_classes=CLASSES, pairs=true * CLASSES + predicted, losses=losses)


def best_of(metric, value, epoch):
    return {"metric": f"val/{metric}", "value": value, "epoch": epoch, "step": 10 * epoch}


def judged(metric, before, now, values):
    recorder = Recorder()
    noise = Noise(recorder)
    former = best_of(metric, values[0], 1)
    noise.judge(None, former, before)
    noise.judge(former, best_of(metric, values[1], 4), now)
    return recorder


@pytest.mark.parametrize("metric", ["top1", "f1", "balanced_accuracy"])
@pytest.mark.parametrize(("more", "is_noise"), [(1, True), (3, True), (12, False)])
def test_one_image_of_200_is_noise_and_twelve_are_not(one_rank, metric, more, is_noise):
    found = judged(metric, answers(160), answers(160 + more), (0.8, 0.8 + more / 200))
    assert len(found.events) == len(found.lines) == is_noise
    if is_noise:
        (event,) = found.events
        assert (event["kind"], event["epoch"], event["former_epoch"]) == ("best_within_noise", 4, 1)
        assert event["gain"] == pytest.approx(more / 200)
        assert "is the best so far, but no better than the 0.8000 of epoch 2 by more than chance" in found.lines[0]
        assert "200 images" in found.lines[0]


@pytest.mark.parametrize(("shift", "is_noise"), [(0.001, True), (0.1, False)])
def test_losses_are_compared_image_by_image(one_rank, shift, is_noise):
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(200, generator=generator).double() * 3
    now = before - shift + 0.2 * torch.randn(200, generator=generator).double()
    means = (before.mean().item(), before.mean().item() - shift)
    found = judged("loss", answers(160, losses=before), answers(160, losses=now), means)
    assert len(found.events) == is_noise


def test_nothing_is_said_where_nothing_is_known(one_rank):
    values = (0.8, 0.805)
    assert not judged("auroc", answers(160), answers(161), values).events  # of more probabilities than are kept
    assert not judged("of_mine", answers(160), answers(161), values).events
    assert not judged("loss", answers(160), answers(161), values).events  # of a loss that gives means
    assert not judged("top1", answers(160), answers(161, share="other"), values).events


@pytest.mark.parametrize("metric", ["f1", "auroc"])
def test_ranks_say_what_one_says(in_ranks, metric, monkeypatch):
    draw, of_gain = redraw._draw, noises.noise_of_gain

    def work(ranks):
        recorder = Recorder()
        noise = Noise(recorder if ranks.rank == 0 else None)
        monkeypatch.setattr(redraw, "_draw", draw if ranks.rank == 0 else None)  # the others have nothing to tell
        monkeypatch.setattr(noises, "noise_of_gain", of_gain if ranks.rank == 0 else None)
        start, end = {1: [(0, 200)], 3: [(0, 50), (50, 50), (50, 200)]}[ranks.world_size][ranks.rank]
        for number, right in enumerate((160, 161)):
            pairs, generator = answers(right).pairs, torch.Generator().manual_seed(0)
            true = functional.one_hot(pairs // CLASSES, CLASSES).bool()
            likely = torch.rand(200, CLASSES, generator=generator) + functional.one_hot(pairs % CLASSES, CLASSES)
            likely, true = likely[start:end], true[start:end]
            scores = redraw.Scores(probabilities=likely, true=true, hits=hits_of(likely, true).bool(), samples=200)
            one = Answers(share=0, samples=200, num_classes=3, pairs=pairs[start:end], losses=None, scores=scores)
            former = best_of(metric, 0.8, 0) if number else None
            noise.judge(former, best_of(metric, 0.8 + number / 1000, number), one)
            assert redraw.intervals(scores, wanted=ranks.rank == 0) or ranks.rank
        return recorder.events

    (one,), many = in_ranks(1, work), in_ranks(3, work)
    assert len(one) == 1
    assert many[0] == one


@pytest.mark.parametrize("several", [False, True])
def test_a_rank_without_images_agrees_that_a_loss_gives_means(in_ranks, several):
    """Else it alone would add up differences of losses, and wait for the others for ever."""

    def work(ranks):
        loss = Loss("mean", functional.binary_cross_entropy_with_logits if several else functional.cross_entropy, {})
        names, cpu = ["a", "b", "c"], torch.device("cpu")
        totals = MultiLabelTotals(names, cpu, loss, threshold=0.5) if several else ValidationTotals(names, cpu, loss)
        if ranks.rank == 0:
            totals.add(torch.eye(3), torch.eye(3) if several else torch.arange(3))
        found = totals.compute()
        assert found["samples"] == 3
        return totals.answers(0, 3).losses

    assert in_ranks(2, work) == [None, None]


def scored(right, *, several, num=200):
    """Totals of as many images, of three classes in turn, of which ``right`` are answered surely and rightly."""
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(num) % CLASSES
    logits = torch.randn(num, CLASSES, generator=generator)
    logits[:right] = 3 * torch.nn.functional.one_hot(true[:right], CLASSES) - 1.5 + 0.5 * logits[:right]
    return totals_of(logits, true, several=several)


def totals_of(logits, true, *, several):
    """All metrics' values, and the answers."""
    num, classes = logits.shape
    names, cpu = [str(number) for number in range(classes)], torch.device("cpu")
    function = functional.binary_cross_entropy_with_logits if several else functional.cross_entropy
    loss = Loss("each", function, {})
    totals = MultiLabelTotals(names, cpu, loss, threshold=0.4) if several else ValidationTotals(names, cpu, loss)
    totals.add(logits, functional.one_hot(true, classes).float() if several else true)
    values = totals.compute()
    return values, totals.answers(0, num)


OF_SCORES = ["top5", "auroc", "average_precision", "ece"]
OF_SEVERAL = [name for name in METRICS if name != "loss"]


@pytest.mark.parametrize(("several", "metric"), [*((False, m) for m in OF_SCORES), *((True, m) for m in OF_SEVERAL)])
def test_what_follows_from_probabilities_is_judged_too(one_rank, several, metric):
    (values, former), more, most = (scored(right, several=several) for right in (160, 161, 199))
    judgements = [judged(metric, former, now, (values[metric], new[metric])).events for new, now in (more, most)]
    assert bool(judgements[0]) == (metric != "top5")  # of three classes all are among the five likeliest
    assert not judgements[1] or metric == "ece"
    drawn_once = redraw._value_of(metric)(former.scores.gather(), torch.ones(1, 200, dtype=torch.float64))
    assert drawn_once.item() == pytest.approx(values[metric], abs=1e-9)


@pytest.mark.parametrize("several", [False, True])
def test_hits_are_those_of_logits_where_probabilities_are_equal(one_rank, several):
    logits = 40 + 200 * torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(n)) for n in range(20)])
    true = logits.argsort(dim=1, descending=True)[torch.arange(20), torch.tensor([0, 4] * 10)]  # likeliest, and fifth
    values, found = totals_of(logits.float(), true, several=several)
    once = torch.ones(1, 20, dtype=torch.float64)
    drawn = {name: redraw._value_of(name)(found.scores.gather(), once).item() for name in ("top1", "top5")}
    assert drawn == {"top1": values["top1"], "top5": values["top5"]} == {"top1": 0.5, "top5": 1.0}


@pytest.mark.parametrize(("num", "classes", "is_kept"), [(9_000, 3, True), (70_000, 3, False), (90, 1_001, False)])
def test_of_many_probabilities_none_are_exchanged(one_rank, monkeypatch, num, classes, is_kept):
    logits = torch.randn(num, classes, generator=torch.Generator().manual_seed(0))
    _, found = totals_of(logits, torch.arange(num) % classes, several=False)
    monkeypatch.setattr(redraw, "gather_rows", None)
    assert bool(found.scores) == is_kept
    assert redraw.intervals(found.scores) == {}
