"""Whatever the ranks and their batches: the gradient is that of the global batch."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from launcher.engine.data import read_image
from launcher.engine.distributed import Ranks
from launcher.engine.schedule import Batching, epoch_order
from launcher.engine.setup import build_parts
from tests.engine.trained import MEAN, STD, UNEVEN, moved

STEPS = {18: [18, 10, 9], 10: [10, 10, 10, 7], None: [3]}
"""By the global batch, the steps of 37 images; of a global batch that there are not enough images for, one of three."""


def reference(run, engine, *, global_size):
    """Train without DDP, schedule, slices, micro-batches or weighting: one mean loss over each whole global batch."""
    parts = build_parts(run, Ranks(), engine.cpu)
    engine.without_dropout(parts)
    module, recipe = parts.model.module.train(), parts.recipe
    optimizer = torch.optim.SGD(
        module.parameters(), lr=recipe.optim.lr, momentum=0.9, nesterov=True, weight_decay=recipe.optim.weight_decay
    )
    losses = []
    for epoch in range(recipe.train.epochs):
        parts.model.freeze(epoch)
        order = epoch_order(recipe.seed, epoch, 37).tolist()
        for size in STEPS[global_size]:
            samples, order = [parts.train_set.samples[i] for i in order[:size]], order[size:]
            images = torch.stack([(read_image(path) / 255 - MEAN) / STD for path, _ in samples])
            labels = torch.tensor([label for _, label in samples])
            smoothing = recipe.train.label_smoothing
            loss = nn.functional.cross_entropy(module(images), labels, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            if recipe.train.clip_grad_norm:
                nn.utils.clip_grad_norm_(module.parameters(), recipe.train.clip_grad_norm)
            if recipe.train.clip_grad_value:
                nn.utils.clip_grad_value_(module.parameters(), recipe.train.clip_grad_value)
            optimizer.step()
            losses.append(loss.item())
    return module.state_dict(), losses


def agrees(engine, found, expected):
    state, losses = expected
    assert engine.largest_difference(found.state, state) < 2e-6
    assert [line["loss"] for line in found.lines if line["split"] == "train"] == pytest.approx(losses, rel=1e-5)


SPREADS = [(1, 18, 1), (1, 6, 3), (2, 9, 1), (2, 3, 3), (3, 6, 1), (3, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "size", "accumulate"), SPREADS)
def test_weights_are_those_of_one_process_however_the_batch_is_spread(
    make_run, engine, in_ranks, world_size, size, accumulate
):
    run = make_run(batch={"size": size, "accumulate": accumulate})
    ranks = in_ranks(world_size, lambda who: engine.train(run, who, prepare=engine.without_dropout))
    agrees(engine, ranks[0], reference(run, engine, global_size=18))
    assert ranks[0].step == 3
    assert all(engine.identical(rank.state, ranks[0].state) for rank in ranks)
    assert [line["samples"] for line in ranks[0].lines] == [18, 10, 9, 23]
    assert len(moved(ranks[0].initial, ranks[0].state)) == len(ranks[0].state)


def test_also_where_two_of_three_ranks_have_no_image(make_run, engine, in_ranks):
    run, rest = make_run(batch={"size": 6}), epoch_order(0, 0, 37)[3:].tolist()

    def prepare(parts):
        engine.without_dropout(parts)
        parts.schedule = replace(parts.schedule, excluded=frozenset(rest))

    ranks = in_ranks(3, lambda who: engine.train(run, who, prepare=prepare))
    agrees(engine, ranks[0], reference(run, engine, global_size=None))
    assert all(engine.identical(rank.state, ranks[0].state) for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "size", "accumulate"), [(1, 6, 3), (2, 9, 1), (3, 2, 3)])
@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"label_smoothing": 0.2}},
        {"train": {"clip_grad_norm": 0.5}},
        {"train": {"clip_grad_value": 1e-3}},
        {"train": {"epochs": 3}, "model": {"freeze": ["backbone"], "unfreeze": {1: "features.12", 2: "features"}}},
        {"train": {"channels_last": True}},
    ],
    ids=["smoothing", "clipping", "clipping by value", "unfreezing", "channels last"],
)
def test_also_with(make_run, engine, in_ranks, changes, world_size, size, accumulate):
    run = make_run(batch={"size": size, "accumulate": accumulate}, **changes)
    ranks = in_ranks(world_size, lambda who: engine.train(run, who, prepare=engine.without_dropout))
    expected = reference(run, engine, global_size=18)
    agrees(engine, ranks[0], expected)
    assert all(engine.identical(rank.state, ranks[0].state) for rank in ranks)
    if "channels_last" not in changes["train"]:  # it does change the weights, or nothing would be proved
        base = make_run("base", train={"epochs": changes["train"].get("epochs", 1)})
        assert engine.largest_difference(expected[0], reference(base, engine, global_size=18)[0]) > 1e-4


SEVERAL = {"task": "multi_label", "dataset": "tests.several_labels:Photos"}


def in_double(parts):
    """Compute in float64: the model and what it is given."""
    parts.model.module.double()
    parts.model.module.register_forward_pre_hook(lambda _, images: (images[0].double(),))


@pytest.fixture
def weighed_list(photos, tmp_path):
    """A list of the photos, each with a weight of its own."""
    rows = [
        f"{file},{file.parent.name},{split},{number % 5 / 2}\n"
        for split in ("train", "val")
        for number, file in enumerate(sorted((photos / split).glob("*/*.png")))
    ]
    file = tmp_path / "list.csv"
    file.write_text("path,label,split,weight\n" + "".join(rows))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": {"mixup": 0.4}, "train": {"label_smoothing": 0.1}},
        {"data": {"cutmix": 1.0}, "train": {"loss": "binary_cross_entropy"}},
        {"data": {"balance": "weights", "mixup": 0.4, "cutmix": 1.0}, "train": {"loss": "focal"}},
        {"data": {"balance": "sampler"}},
        {"data": {"balance": "weights"}, "train": {"label_smoothing": 0.1}},
        {
            "data": SEVERAL | {"balance": "weights", "mixup": 0.4},
            "train": {"loss": "binary_cross_entropy", "label_smoothing": 0.1},
        },
        {"data": {"path": "list.csv", "balance": "weights", "mixup": 0.4}},
    ],
    ids=[
        "plain",
        "mixup and smoothing",
        "cutmix",
        "all of it",
        "seen evenly",
        "weights and smoothing",
        "several labels",
        "weights of images",
    ],
)
def test_batches_of_24_and_8_give_the_gradient_of_32_in_double_precision(
    make_run, engine, in_ranks, changes, weighed_list, monkeypatch
):
    """37 images: steps of 19 and 18. Without momentum and decay the weights have moved by gradients only."""
    monkeypatch.chdir(weighed_list.parent)
    run = make_run(batch={"size": 32}, optim={"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}, **changes)
    spreads = [((32,), (32,)), ((24, 8), (24, 8)), ((4, 3), (24, 8))]  # the last accumulates

    def moves(batch_sizes, shares):
        def prepare(parts):
            engine.without_dropout(parts)
            in_double(parts)
            parts.schedule = replace(
                parts.schedule, batching=Batching(batch_sizes=batch_sizes, shares=shares, global_batch_size=32)
            )

        stop = engine.at_poll(3)  # before a validation, which takes time
        ranks = in_ranks(len(shares), lambda who: engine.train(run, who, prepare=prepare, stop=stop))
        shutil.rmtree(run.checkpoints)
        return ranks[0]

    whole, *others = (moves(*spread) for spread in spreads)
    assert len(moved(whole.initial, whole.state)) == len(whole.state)
    for found in others:
        assert engine.largest_difference(found.state, whole.state) < 1e-6
        assert [line["loss"] for line in found.lines] == pytest.approx([line["loss"] for line in whole.lines])
        assert [line["top1"] for line in found.lines] == pytest.approx([line["top1"] for line in whole.lines])


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "size"), [(1, 3), (2, 3), (3, 16)])
def test_a_global_size_is_kept_at_any_world_size(make_run, engine, in_ranks, world_size, size):
    run = make_run(batch={"size": size, "global_size": 10})
    found = in_ranks(world_size, lambda who: engine.train(run, who, prepare=engine.without_dropout))[0]
    assert [line["samples"] for line in found.lines if line["split"] == "train"] == [10, 10, 10, 7]
    agrees(engine, found, reference(run, engine, global_size=10))


@pytest.mark.slow
def test_ranks_of_different_batch_sizes_give_the_same_weights(make_run, engine, in_ranks):
    run = make_run()

    def prepare(parts):
        engine.without_dropout(parts)
        parts.schedule = replace(parts.schedule, batching=UNEVEN)

    # It stops at the start of validation, where a stop is learned of one poll after it was asked for.
    found = in_ranks(3, lambda who: engine.train(run, who, prepare=prepare, stop=engine.at_poll(3)))[0]
    assert (found.outcome, found.step) == ("preempted", 3)
    agrees(engine, found, reference(run, engine, global_size=18))


def test_ranks_of_different_batch_sizes_have_as_many_validation_batches(make_run, engine):
    run = make_run()
    numbers, seen = [], Counter()
    for rank in range(3):
        parts = build_parts(run, Ranks(rank=rank, world_size=3), engine.cpu)
        parts.schedule = replace(parts.schedule, batching=UNEVEN)
        batches = list(parts.val_loader())
        numbers.append(len(batches))
        seen.update(labels.numel() for _, labels in batches)
    assert sum(size * times for size, times in seen.items()) == 23
    assert len(set(numbers)) == 1  # all agree before each batch whether to stop: one with more would wait for ever


def test_auxiliary_heads_learn_with_the_weight_of_their_loss(make_run, engine, one_rank):
    plain = {"lr": 0.01, "momentum": 0.0, "weight_decay": 0.0}
    run = make_run(model={"arch": "googlenet"}, batch={"size": 37}, optim=plain)
    found = engine.train(run, prepare=engine.without_dropout)
    parts = build_parts(run, Ranks(), engine.cpu)
    engine.without_dropout(parts)
    module = parts.model.module.train()
    samples = [parts.train_set.samples[i] for i in epoch_order(0, 0, 37)]
    labels = torch.tensor([label for _, label in samples])
    out = module(torch.stack([(read_image(path) / 255 - MEAN) / STD for path, _ in samples]))
    main, aux2, aux1 = (nn.functional.cross_entropy(logits, labels) for logits in out)
    (main + 0.3 * aux1 + 0.3 * aux2).backward()
    for name, parameter in module.named_parameters():
        expected = parameter - 0.01 * parameter.grad
        torch.testing.assert_close(found.state[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    for head in ("aux1.fc2.weight", "aux2.fc2.weight", "fc.weight"):
        assert not torch.equal(found.state[head], found.initial[head])
    assert found.lines[0]["loss"] == pytest.approx(main.item(), rel=1e-5)  # without the auxiliary ones


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_weights_after_a_resume_at_another_world_size_are_the_same_but_for_rounding(
    make_run, engine, in_ranks, before, after
):
    run = make_run(batch={"size": 4, "global_size": 10}, train={"epochs": 2})
    work = {"prepare": engine.without_dropout}
    first = in_ranks(before, lambda who: engine.train(run, who, stop=engine.at_poll(2), **work))
    assert (first[0].outcome, first[0].step) == ("preempted", 2)
    second = in_ranks(after, lambda who: engine.train(run, who, **work))
    assert engine.largest_difference(second[0].state, reference(run, engine, global_size=10)[0]) < 2e-6
