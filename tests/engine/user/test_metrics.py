"""A recipe's own metrics: the same number for any world size and batch sizes, or refused before anything starts."""

from __future__ import annotations

import random
import re
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torchmetrics import Metric

from launcher.engine.losses import Loss, cross_entropy
from launcher.engine.user import metrics as user_metrics
from launcher.engine.validating.totals import ValidationTotals
from launcher.errors import TrainingError, UsageError
from launcher.recipe import load as recipes
from launcher.recipe import metrics as recipe_metrics
from launcher.recipe.schema_train import MetricConfig

CPU = torch.device("cpu")
CLASSES, NUM = 7, 40
OF_TORCHMETRICS = [
    ("MulticlassCalibrationError", "min", {"num_classes": "auto"}),  # keeps lists
    ("MulticlassAUROC", "max", {}),
    ("MulticlassAccuracy", "max", {"average": "macro"}),
    ("MulticlassMatthewsCorrCoef", "max", {}),
    ("MulticlassCohenKappa", "max", {}),
]


def answers(num=NUM):
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(num, CLASSES, generator=generator), torch.randint(CLASSES, (num,), generator=generator)


def spread(probabilities, targets):
    """A plain function."""
    return float((probabilities[torch.arange(len(targets)), targets]).std())


class Brier(Metric):
    """States that are sums, one of which only the first update makes anything of."""

    higher_is_better = False

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, probabilities, targets):
        wanted = functional.one_hot(targets, probabilities.shape[1])
        self.total += (probabilities.double() - wanted).square().sum()
        self.num += len(targets)

    def compute(self):
        return self.scale * self.total / self.num


class Uneven(Metric):
    """Keeps a list that is not put together, of as many tensors as there were batches."""

    def __init__(self):
        super().__init__()
        self.add_state("batches", [], dist_reduce_fx=None)

    def update(self, probabilities, targets):
        self.batches.append(probabilities.max(dim=1).values)

    def compute(self):
        return torch.cat(self.batches).double().mean()


class Unreduced(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("num", torch.tensor(0.0))

    def update(self, probabilities, targets):
        self.num += probabilities.max(dim=1).values.sum()

    def compute(self):
        return self.num


class Averaged(Unreduced):
    """The mean over ranks of what is a sum."""

    def __init__(self):
        super().__init__()
        self._reductions["num"] = torch.mean


def build_counting_from(num_classes, start=0):
    """A factory."""
    metric = Brier(scale=num_classes)
    metric.start = start
    return metric


def per_class(probabilities, targets):
    return probabilities.mean(dim=0)


def several(probabilities, targets):
    return {"a": 1.0, "b": 2.0}


HERE = f"{__name__.rpartition('.')[2]}"
ROWS = [
    *(
        {"metric": f"torchmetrics.classification:{name}", "mode": mode, "args": args}
        for name, mode, args in OF_TORCHMETRICS
    ),
    {"metric": f"{HERE}:Brier", "mode": "min"},
    {"metric": f"{HERE}:build_counting_from", "mode": "min", "name": "factory"},
    {"metric": f"{HERE}:Uneven"},
    f"{HERE}:spread",
]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """References name this file as the module that it is."""
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


def build(rows=ROWS):
    recipe = recipes.from_dict({"metrics": rows})
    return user_metrics.UserMetrics(recipe, num_classes=CLASSES, device=CPU)


def test_metrics_of_torchmetrics_do_not_look_for_mistakes_in_each_batch(one_rank):
    metrics = build()._metrics.values()
    assert [metric.validate_args for metric in metrics if hasattr(metric, "validate_args")] == [False] * len(
        OF_TORCHMETRICS
    )


def computed(found, logits, labels, cuts):
    for start, end in pairwise([0, *cuts, len(labels)]):
        if start < end:
            found.add(logits[start:end], labels[start:end])
    return found.compute()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(cuts=st.lists(st.integers(1, NUM - 1), unique=True, max_size=6).map(sorted))
def test_metrics_are_the_same_however_the_samples_come_in_batches(one_rank, cuts):
    logits, labels = answers()
    own = build()
    whole, again = (computed(own, logits, labels, each) for each in ([], cuts))
    assert again == pytest.approx(whole, rel=1e-5)
    assert list(whole) == list(recipe_metrics.own(ROWS))


def test_metrics_are_the_same_for_any_world_size(in_ranks):
    """A property test in real process groups: shares of any size, none included, in batches of any size."""
    logits, labels = answers()
    chance = random.Random(0)  # noqa: S311  how the samples are dealt

    def deal(world_size):
        bounds = [0, *sorted(chance.randint(0, NUM) for _ in range(world_size - 1)), NUM]
        shares = [(start, end) for start, end in pairwise(bounds)]
        return [
            (
                start,
                end,
                sorted(chance.sample(range(start + 1, end), chance.randint(0, max(0, min(4, end - start - 1))))),
            )
            for start, end in shares
        ]

    dealt = {size: [deal(size) for _ in range(6)] for size in (1, 2, 3)}
    dealt[2].append([(0, 0, []), (0, NUM, [3])])

    def work(ranks):
        own, found = build(), []
        for deals in dealt[ranks.world_size]:
            start, end, cuts = deals[ranks.rank]
            for first, last in pairwise([start, *cuts, end]):
                if first < last:
                    own.add(logits[first:last], labels[first:last])
            found.append(own.compute())
        return found

    (one,) = in_ranks(1, work)
    for size in (2, 3):
        ranks = in_ranks(size, work)
        assert all(found == ranks[0] for found in ranks)
        for found in ranks[0]:
            assert found == pytest.approx(one[0], rel=1e-5)


def problem_of(metric, **row):
    return user_metrics.find_problem(MetricConfig(metric=metric, **row), CLASSES)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_good_ones_are_taken(row):
    (config,) = recipe_metrics.configs(recipes.from_dict({"metrics": [row]}).metrics).values()
    assert user_metrics.find_problem(config, CLASSES) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Unreduced", "several numbers of the same on three.*dist_reduce_fx"),
        ("Averaged", "of some answers on one rank and .* of the same on three"),
        ("per_class", r"gives a tensor of shape \(7,\); a metric is one number"),
        ("several", "gives a dict of a, b; a metric is one number"),
        ("Brier", "less of it is better; write mode: min"),
    ],
)
def test_what_is_no_single_number_over_ranks_is_refused(name, words):
    assert re.search(words, problem_of(f"{HERE}:{name}"))


def test_a_collection_is_refused():
    with pytest.raises(UsageError, match="of a collection each"):
        problem_of("torchmetrics:MetricCollection", args={"metrics": []})


def test_a_value_that_becomes_several_later_ends_training_by_its_name(one_rank):
    own = build([f"{HERE}:spread"])
    own._metrics["spread"]._function = per_class
    own.add(*answers())
    with pytest.raises(TrainingError, match=r"metrics: spread gives a tensor of shape \(7,\)"):
        own.compute()


def test_a_validation_that_was_broken_off_leaves_nothing_behind(one_rank):
    logits, labels = answers()
    loss = Loss("cross_entropy", cross_entropy, {})
    own = build([f"{HERE}:spread", *ROWS[:1]])
    expected = computed(own, logits[:9], labels[:9], [])
    ValidationTotals([*"abcdefg"], CPU, loss, own).add(logits, labels)  # and then memory ran out, or all ranks stopped
    totals = ValidationTotals([*"abcdefg"], CPU, loss, own)
    totals.add(logits[:9], labels[:9])
    assert expected.items() <= totals.compute().items()


def test_an_error_comes_with_the_metric_and_not_after_an_epoch(monkeypatch):
    def broken(probabilities, targets):
        raise ZeroDivisionError("theirs")

    monkeypatch.setattr(sys.modules[__name__], "spread", broken)
    with pytest.raises(ZeroDivisionError, match="theirs"):
        build([f"{HERE}:spread"])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_stopped_anywhere_ends_with_the_bits_of_one_that_was_not(make_run, engine, in_ranks, world_size):
    changes = {
        "batch": {"size": 5},
        "metrics": ROWS[:2],
        "train": {
            "epochs": 2,
            "loss": "torch.nn:CrossEntropyLoss",
            "loss_args": {"label_smoothing": 0.1},
            "early_stopping": {"metric": "val/MulticlassCalibrationError", "mode": "min"},
        },
    }
    whole = make_run("whole", **changes)
    expected = in_ranks(world_size, lambda who: engine.train(whole, who))[0]
    run, outcomes, lines = make_run("stopped", **changes), [], []
    for poll in (3, 8, 14, 200):  # in an epoch, in a validation
        found = in_ranks(world_size, lambda who, poll=poll: engine.train(run, who, stop=engine.at_poll(poll)))[0]
        outcomes.append(found.outcome)
        lines += found.lines
    assert outcomes[0] == "preempted"
    assert outcomes[-1] == "completed"
    for part in ("state", "optimizer", "best", "step"):
        assert engine.identical(getattr(found, part), getattr(expected, part)), part
    last = {(line["split"], line["step"]): line for line in lines}
    assert list(last.values()) == expected.lines
