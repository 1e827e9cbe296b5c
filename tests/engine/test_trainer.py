from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.data import read_image
from launcher.engine.device import Device
from launcher.engine.distributed import Ranks
from launcher.engine.listeners.recorder import Recorder
from launcher.engine.schedule import Batching, epoch_order
from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer
from launcher.errors import TrainingError
from launcher.system import processes
from tests.nets import MATRICES, NET

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


UNEVEN = Batching(batch_sizes=(1, 5, 3), shares=(1, 5, 3), global_batch_size=18)


def moved(one, other, prefix=""):
    return {name for name in one if name.startswith(prefix) and not torch.equal(one[name], other[name])}


def events(run, kind):
    return [event for line in run.events.read_text().splitlines() if (event := json.loads(line))["kind"] == kind]


@pytest.fixture
def on_the_disk_at_once(monkeypatch):
    """Training waits for each checkpoint, so that none gives way to the next one."""
    save = checkpoints.CheckpointWriter.save

    def save_and_wait(self, checkpoint, *, best):
        save(self, checkpoint, best=best)
        self.wait()

    monkeypatch.setattr(checkpoints.CheckpointWriter, "save", save_and_wait)


def saved_steps(run):
    return sorted(int(folder.name.removeprefix("step-")) for folder in run.checkpoints.glob("step-*"))


# The gradient of the global batch


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


# Every sample once


class Watched(torch.utils.data.Dataset):
    def __init__(self, dataset, seen):
        self.dataset, self.classes, self.digest, self.seen = dataset, dataset.classes, dataset.digest, seen
        self.labels = dataset.labels

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, position):
        self.seen.append(position)
        return self.dataset[position]


def watching(engine, run, **options):
    """A function of Ranks that trains and also says which (epoch, index) its rank has loaded."""

    def work(ranks):
        seen = []

        def prepare(parts):
            engine.without_dropout(parts)
            parts.train_set = Watched(parts.train_set, seen)

        result = engine.train(run, ranks, prepare=prepare, **options)
        result.seen = seen
        return result

    return work


EVERY_SAMPLE_ONCE = {(epoch, i): 1 for epoch in range(2) for i in range(37)}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "size", "accumulate"), [(1, 4, 1), (2, 3, 2), (3, 5, 1)])
def test_an_epoch_trains_on_every_image_once(make_run, engine, in_ranks, world_size, size, accumulate):
    run = make_run(batch={"size": size, "accumulate": accumulate}, train={"epochs": 2})
    ranks = in_ranks(world_size, watching(engine, run))
    assert Counter(position for rank in ranks for position in rank.seen) == EVERY_SAMPLE_ONCE


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "poll"), [(2, 3, 2), (3, 1, 4), (1, 2, 9)])
def test_also_across_a_stop_and_a_resume_at_another_world_size(make_run, engine, in_ranks, before, after, poll):
    run = make_run(batch={"size": 5}, train={"epochs": 2})
    first = in_ranks(before, watching(engine, run, stop=engine.at_poll(poll)))
    assert first[0].outcome == "preempted"
    second = in_ranks(after, watching(engine, run))
    assert second[0].outcome == "completed"
    assert Counter(position for rank in first + second for position in rank.seen) == EVERY_SAMPLE_ONCE
    epochs = Counter()
    for line in [*first[0].lines, *second[0].lines]:
        epochs[line["split"], line["epoch"]] += line["samples"]
    assert epochs == {("train", 0): 37, ("train", 1): 37, ("val", 0): 23, ("val", 1): 23}


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


# Validation


def validating(engine, run):
    def work(ranks):
        parts = build_parts(run, ranks, engine.cpu)
        parts.model.freeze(0)
        parts.wrap()  # hands rank 0's weights on
        parts.model.train()
        trainer = Trainer(parts, recorder=None, stop_requested=engine.never)
        values = trainer._validate()
        trainer._agreement.collect()
        return values

    return work


@dataclass(frozen=True, kw_only=True)
class HoldsSome(Device):
    """A CPU on which several batches go through the model at once in validation."""

    @property
    def batches_in_validation(self):
        return 3


def test_larger_batches_in_validation_and_halves_where_memory_runs_out_change_no_count(
    make_run, engine, one_rank, monkeypatch
):
    run, sizes, found = make_run(batch={"size": 4}), [], []
    for device, most in ((engine.cpu, 4), (HoldsSome(type="cpu"), 12), (HoldsSome(type="cpu"), 5)):
        parts = build_parts(run, Ranks(), device)
        parts.model.freeze(0)
        parts.wrap()
        forward = parts.model.module.forward

        def limited(images, forward=forward, most=most):
            if len(images) > most:
                raise torch.OutOfMemoryError("no memory")
            sizes.append(len(images))
            return forward(images)

        monkeypatch.setattr(parts.model.module, "forward", limited)
        trainer = Trainer(parts, recorder=None, stop_requested=engine.never)
        found.append(trainer._validate())
        trainer._agreement.collect()
    assert sizes == [4, 4, 4, 4, 4, 3, 12, 11, 3, 3, 3, 3, 3, 3, 3, 2]
    loss = found[0].pop("loss")
    assert [one.pop("loss") for one in found[1:]] == pytest.approx([loss, loss], rel=1e-6)
    assert found[0] == found[1] == found[2]


def sound_weights(folder, path, arch="shufflenet_v2_x0_5"):
    """Of a model with BatchNorm whose statistics are those of the training images, so that its predictions differ."""
    torch.manual_seed(0)
    module = models.get_model(arch, weights=None, num_classes=7)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        module(torch.stack([(read_image(str(file)) / 255 - MEAN) / STD for file in folder.glob("train/*/*.png")]))
    save_file(module.state_dict(), path)
    return module.eval()


def counted_by_hand(module, folder):
    confusion, top5 = torch.zeros(7, 7, dtype=torch.int64), 0
    for label, name in enumerate(sorted(child.name for child in (folder / "val").iterdir())):
        for file in (folder / "val" / name).iterdir():
            with torch.no_grad():
                ranked = module((read_image(str(file)) / 255 - MEAN)[None] / STD)[0].argsort(descending=True)
            confusion[label, ranked[0]] += 1
            top5 += label in ranked[:5].tolist()
    return confusion, top5


@pytest.mark.slow
def test_validation_counts_are_the_same_for_any_world_size_and_batch_size(make_run, engine, in_ranks, photos, tmp_path):
    weights = tmp_path / "weights.safetensors"
    confusion, top5 = counted_by_hand(sound_weights(photos, weights), photos)
    assert len(confusion.sum(0).nonzero()) > 2  # more than two classes are predicted, some of them rightly
    assert 0 < confusion.trace() < top5 < 23
    for number, (world_size, size) in enumerate([(1, 23), (1, 4), (2, 5), (3, 2), (3, 32)]):
        model = {"arch": "shufflenet_v2_x0_5", "weights": str(weights)}
        run = make_run(f"run-{number}", model=model, batch={"size": size})
        for found in in_ranks(world_size, validating(engine, run)):
            assert found["confusion"] == confusion.tolist()
            assert found["samples"] == 23
            assert found["top1"] == confusion.trace().item() / 23
            assert found["top5"] == pytest.approx(top5 / 23, abs=1e-7)
            if number == 0:
                first = found
            rounded = ("loss", "ece")  # sums of what a network gives, which is rounded by the size of its batch
            assert all(found[name] == pytest.approx(first[name], rel=1e-5) for name in rounded)
            assert {k: v for k, v in found.items() if k not in rounded} == {
                k: v for k, v in first.items() if k not in rounded
            }


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_rank_without_validation_images_takes_part(make_run, engine, in_ranks, tmp_path):
    folder = engine.write_images(tmp_path / "two", train=6, val=2, classes=["a", "b"])
    run = make_run(data={"path": str(folder)})
    for found in in_ranks(3, validating(engine, run)):
        assert found["samples"] == 2
        assert sum(map(sum, found["confusion"])) == 2


@pytest.mark.parametrize("arch", ["shufflenet_v2_x0_5", "mobilenet_v2"])
def test_one_image_more_than_the_steps_hold_does_not_explode_in_batch_norm(
    make_run, engine, one_rank, photos, tmp_path, arch
):
    """At 32 px the last layers see one pixel, and its variance over one image, or over two copies of it, is nothing."""
    weights = tmp_path / "weights.safetensors"
    sound_weights(photos, weights, arch)
    largest = {}
    for size in (12, 37):  # 12, 12, 12 and 1 over; or one step of all images
        model = {"arch": arch, "weights": str(weights)}
        run = make_run(f"run-{size}", model=model, batch={"size": size}, optim={"lr": 1e-3})
        found = engine.train(run)
        largest[size] = max((found.state[name] - found.initial[name]).abs().max() for name in parameters(found.state))
    assert largest[12] < 100 * largest[37]


@pytest.mark.slow
def test_one_image_more_than_the_steps_hold_does_not_make_training_diverge(make_run, engine, one_rank, tmp_path):
    folder = engine.write_images(tmp_path / "images", train=41, val=14, classes=["bee", "cat"])
    for seed in range(6):
        changes = {"model": {"arch": "resnet18"}, "optim": {"lr": 0.05}, "data": {"path": str(folder)}}
        run = make_run(f"run-{seed}", **changes, seed=seed, batch={"size": 8}, train={"epochs": 2})
        found = engine.train(run)  # one that diverges ends with a TrainingError
        assert found.outcome == "completed"
        assert found.lines[-1]["loss"] < 100, seed  # at this rate 40 images, too, do not always come to rest


# What learns


FREEZING = {"arch": "shufflenet_v2_x0_5", "freeze": ["conv1", "stage2"]}
SLOW = {"lr": 1e-4, "weight_decay": 0.1}


def parameters(state):
    return state.keys() - statistics(state).keys()


def statistics(state):
    return {
        name: v for name, v in state.items() if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_frozen_does_not_move_and_neither_do_its_batch_norm_statistics(make_run, engine, in_ranks, world_size):
    run = make_run(model=FREEZING, batch={"size": 8 // world_size}, optim=SLOW, train={"epochs": 2})
    found = in_ranks(world_size, lambda who: engine.train(run, who))[0]
    for layer in ("conv1.", "stage2."):
        assert len([name for name in statistics(found.state) if name.startswith(layer)]) >= 3
        assert moved(found.initial, found.state, layer) == set()
    for layer in ("stage3.", "stage4.", "conv5.", "fc."):
        assert moved(found.initial, found.state, layer) == {name for name in found.state if name.startswith(layer)}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_unfrozen_begins_to_learn_in_its_epoch_with_its_statistics(make_run, engine, in_ranks, world_size):
    model = {**FREEZING, "unfreeze": {1: "stage2", 2: ["conv1"]}}
    train = {"epochs": 3, "checkpoint": {"keep": 5}}
    run = make_run(model=model, batch={"size": 8 // world_size}, optim=SLOW, train=train)
    found = in_ranks(world_size, lambda who: engine.train(run, who))[0]
    states = [found.initial, *(checkpoints.load(run.checkpoint(step)).model for step in (5, 10, 15))]
    for epoch, (before, after) in enumerate(pairwise(states)):
        for layer, start in (("conv1.", 2), ("stage2.", 1), ("stage3.", 0)):
            expected = {name for name in after if name.startswith(layer)} if epoch >= start else set()
            assert moved(before, after, layer) == expected, (epoch, layer)


def test_layers_learn_at_the_rates_of_their_groups(make_run, engine, one_rank):
    def change(name, **optim):
        run = make_run(name, batch={"size": 37}, optim={"momentum": 0.0, "weight_decay": 0.0, **optim})
        found = engine.train(run, prepare=engine.without_dropout)
        return {key: found.state[key] - found.initial[key] for key in found.state}

    same = change("same", lr=0.01)
    grouped = change("grouped", lr=0.01, groups={"head": 0.1, "features.12": 0.02, "features": 0.0})
    for name in same:
        times = 10 if name.startswith("classifier") else 2 if name.startswith("features.12.") else 0
        torch.testing.assert_close(grouped[name], times * same[name], rtol=1e-3, atol=1e-7)
        assert same[name].abs().max() > 0


# Bits


LEARNING = {
    "model": NET,
    "data": {"augment": "standard"},
    "optim": {"lr": 0.01, "schedule": "cosine", "warmup_epochs": 0.5},
    "train": {"epochs": 2, "early_stopping": {"metric": "val/top1", "mode": "max", "patience": 5}},
}


def merged(*line_lists):
    """The last line of each (split, step), as a reader takes them."""
    return list({(line["split"], line["step"]): line for lines in line_lists for line in lines}.values())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stopped_at_any_poll_and_resumed_one_rank_ends_with_the_very_same_bits(make_run, engine, one_rank, optimizer):
    changes = {**LEARNING, "optim": {**LEARNING["optim"], "name": optimizer}, "batch": {"size": 4, "accumulate": 2}}
    whole = engine.train(make_run("whole", **changes))
    assert whole.outcome == "completed"
    steps = set()
    for poll in range(1, 22, 3 if optimizer == "sgd" else 5):  # in training and in validation, of both epochs
        run = make_run(f"stopped-{poll}", **changes)
        first = engine.train(run, stop=engine.at_poll(poll))
        assert first.outcome == "preempted"
        assert saved_steps(run)[-1] == first.step
        second = engine.train(run)
        assert (second.outcome, second.step) == ("completed", whole.step)
        assert engine.identical(second.state, whole.state), poll
        assert engine.identical(second.optimizer, whole.optimizer), poll
        assert second.best == whole.best
        assert merged(first.lines, second.lines) == whole.lines
        (event,) = events(run, "resumed")
        assert event["step"] == first.step
        steps.add(first.step)
    assert len(steps) > 2


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["nadam", "radam", "rmsprop", "adafactor", "muon"])
def test_every_optimizer_is_resumed_in_the_middle_of_a_cycle(make_run, engine, one_rank, optimizer):
    optim = {"name": optimizer, "lr": 1e-4, "schedule": "one_cycle", "layer_decay": 0.9, "decay_norms": False}
    changes = {"optim": optim, "train": {"epochs": 2}} | ({"model": MATRICES} if optimizer == "muon" else {})
    whole, run = engine.train(make_run("whole", **changes)), make_run("stopped", **changes)
    assert engine.train(run, stop=engine.at_poll(3)).step in (2, 3)
    found = engine.train(run)
    assert engine.identical(found.state, whole.state)
    assert engine.identical(found.optimizer, whole.optimizer)
    assert len({name for line in found.lines for name in line if name.startswith("lr/")}) > 5
    assert all(line["grad_norm"] > 0 for line in whole.lines if line["split"] == "train")


@pytest.mark.slow
def test_three_stopped_and_resumed_ranks_end_with_the_very_same_bits(make_run, engine, in_ranks):
    world_size, changes = 3, {**LEARNING, "batch": {"size": 4}}
    undisturbed = make_run("whole", **changes)
    whole = in_ranks(world_size, lambda who: engine.train(undisturbed, who))
    for poll in (2, 8):
        run = make_run(f"stopped-{poll}", **changes)
        first = in_ranks(world_size, lambda who, run=run, poll=poll: engine.train(run, who, stop=engine.at_poll(poll)))
        assert {rank.outcome for rank in first} == {"preempted"}
        assert len({rank.step for rank in first}) == 1
        second = in_ranks(world_size, lambda who, run=run: engine.train(run, who))
        for rank in range(world_size):
            found, expected = second[rank].state, whole[rank].state
            assert all(torch.equal(found[name], expected[name]) for name in parameters(found)), poll
        assert engine.identical(second[0].state, whole[0].state)
        assert engine.identical(second[0].optimizer, whole[0].optimizer)
        assert second[0].best == whole[0].best


def test_a_model_that_asks_for_the_version_of_its_state_is_resumed_too(make_run, engine, one_rank):
    changes = {"model": {"arch": "mnasnet0_5"}, "batch": {"size": 12}, "optim": {"lr": 1e-4}}
    whole = engine.train(make_run("whole", **changes))
    run = make_run("stopped", **changes)
    assert engine.train(run, stop=engine.at_poll(1)).outcome == "preempted"
    assert engine.identical(engine.train(run).state, whole.state)


@pytest.mark.slow
def test_the_wish_of_one_rank_stops_all(make_run, engine, in_ranks):
    run = make_run(batch={"size": 4})
    ranks = in_ranks(3, lambda who: engine.train(run, who, stop=engine.at_poll(2) if who.rank == 2 else engine.never))
    assert [(rank.outcome, rank.step) for rank in ranks] == [("preempted", 2)] * 3
    assert saved_steps(run) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("polls", [3, 6])
def test_killed_and_resumed_ranks_end_with_the_very_same_bits(make_run, engine, in_ranks, polls, on_the_disk_at_once):
    changes = {**LEARNING, "batch": {"size": 4}}
    changes["train"] = {**changes["train"], "checkpoint": {"every_steps": 1, "every_minutes": None}}
    undisturbed = make_run("whole", **changes)
    whole = in_ranks(2, lambda who: engine.train(undisturbed, who))[0]
    run = make_run("killed", **changes)
    asked = engine.at_poll(polls)

    def die():
        if asked():
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    codes = in_ranks(2, lambda who: engine.train(run, who, stop=die if who.rank == 1 else engine.never), failing=True)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert saved_steps(run)
    found = in_ranks(2, lambda who: engine.train(run, who))[0]
    assert events(run, "resumed")[0]["step"] >= 1
    assert engine.identical(found.state, whole.state)
    assert engine.identical(found.optimizer, whole.optimizer)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(make_run, engine, one_rank, on_the_disk_at_once):
    changes = {**LEARNING, "batch": {"size": 8}}
    changes["train"] = {**changes["train"], "checkpoint": {"every_steps": 1, "every_minutes": None, "keep": 3}}
    whole = engine.train(make_run("whole", **changes))
    run = make_run("damaged", **changes)
    first = engine.train(run, stop=engine.at_poll(4))
    newest = run.checkpoint(first.step) / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    found = engine.train(run)
    assert [event["path"] for event in events(run, "checkpoint_rejected")] == [str(newest.parent)]
    assert events(run, "resumed")[0]["step"] == first.step - 1
    assert engine.identical(found.state, whole.state)
    assert engine.identical(found.optimizer, whole.optimizer)


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_do(make_run, engine, one_rank):
    run = make_run(batch={"size": 37}, train={"epochs": 2})
    whole = engine.train(run)
    again = engine.train(run)
    assert (again.outcome, again.step, again.lines) == ("completed", 2, [])
    assert engine.identical(again.state, whole.state)


@pytest.mark.slow
def test_the_number_of_loader_processes_changes_nothing(make_run, engine, one_rank):
    found = []
    for workers in (0, 1, 2):
        changes = {
            **LEARNING,
            "data": {"augment": "standard", "workers": workers},
            "batch": {"size": 6, "accumulate": 2},
        }
        found.append(engine.train(make_run(f"run-{workers}", **changes)))
    assert engine.identical(found[1].state, found[2].state)
    assert engine.identical(
        found[0].state, found[1].state
    )  # dropout has to be the same in a process that loads and trains


def test_two_ranks_and_two_steps_drop_other_units(make_run, engine, in_ranks):
    """The model's randomness is a function of (seed, step, rank)."""
    run = make_run(batch={"size": 4}, data={"workers": 1})

    def work(ranks):
        masks = []

        def prepare(parts):
            layer = next(m for m in parts.model.module.modules() if isinstance(m, nn.Dropout))
            layer.register_forward_hook(
                lambda _, __, out: masks.append(torch.dropout(torch.ones(500), 0.5, train=True))
            )
            return layer

        engine.train(run, ranks, prepare=prepare)
        return masks

    masks = [mask for rank in in_ranks(2, work) for mask in rank[:5]]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 10


def test_a_stop_leaves_no_loader_process(make_run, engine, one_rank):
    before = set(processes.children(os.getpid()))
    run = make_run(data={"workers": 2}, batch={"size": 4}, train={"epochs": 3})
    assert engine.train(run, stop=engine.at_poll(3)).outcome == "preempted"
    assert set(processes.children(os.getpid())) <= before


# When it stops and what it saves


@pytest.mark.parametrize(
    ("stopping", "epochs_done"),
    [
        ({"metric": "val/loss", "mode": "min", "patience": 2}, 3),
        ({"metric": "val/top1", "mode": "max", "patience": 1}, 2),
        ({"metric": "train/loss", "mode": "min", "patience": 3}, 4),
        ({"metric": "val/loss", "mode": "min", "patience": None}, 6),
    ],
)
def test_training_stops_after_as_many_epochs_without_a_better_value(make_run, engine, one_rank, stopping, epochs_done):
    stopping = {**stopping, "min_delta": 0.01}
    run = make_run(batch={"size": 37}, optim={"lr": 1e-12}, train={"epochs": 6, "early_stopping": stopping})
    found = engine.train(run, prepare=engine.without_dropout)
    early = epochs_done < 6
    assert found.outcome == ("early_stopped" if early else "completed")
    assert found.step == epochs_done
    assert (found.best["metric"], found.best["epoch"], found.best["step"]) == (stopping["metric"], 0, 1)
    assert [line["best"] for line in found.lines if line["split"] == "val"] == [True] + [False] * (epochs_done - 1)
    assert run.best_checkpoint.resolve() == run.checkpoint(1)
    assert run.last_checkpoint.resolve() == run.checkpoint(epochs_done)
    if early:
        (event,) = events(run, "early_stopped")
        assert event["step"] == epochs_done
        again = engine.train(run, prepare=engine.without_dropout)
        assert (again.outcome, again.step, again.lines) == ("early_stopped", epochs_done, [])


def test_a_patience_is_counted_across_a_resume(make_run, engine, one_rank):
    stopping = {"patience": 3, "min_delta": 0.01}
    run = make_run(batch={"size": 18}, optim={"lr": 1e-12}, train={"epochs": 9, "early_stopping": stopping})
    assert engine.train(run, stop=engine.at_poll(12)).outcome == "preempted"
    found = engine.train(run)
    assert (found.outcome, found.step) == ("early_stopped", 4 * 3)


def test_checkpoints_are_written_at_the_recipes_steps_and_after_each_epoch(
    make_run, engine, one_rank, on_the_disk_at_once
):
    kept = {"every_steps": 2, "every_minutes": None, "keep": 20}
    run = make_run(batch={"size": 8}, train={"epochs": 2, "checkpoint": kept})
    engine.train(run)
    assert saved_steps(run) == [2, 4, 5, 6, 8, 10]
    written = events(run, "checkpoint")
    assert [event["step"] for event in written] == [
        2,
        4,
        5,
        6,
        8,
        10,
        10,
    ]  # the last is a second step and an epoch's end
    for step, position in ((4, (0, 32)), (5, (1, 0)), (6, (1, 8)), (10, (2, 0))):
        state = checkpoints.read_state(run.checkpoint(step))
        assert (state["epoch"], state["offset"], state["step"]) == (*position, step)


@pytest.mark.slow
def test_checkpoints_by_the_clock_are_agreed_upon(make_run, engine, in_ranks, on_the_disk_at_once):
    run = make_run(batch={"size": 4}, train={"checkpoint": {"every_minutes": 1e-9, "keep": 20}})
    ranks = in_ranks(2, lambda who: engine.train(run, who))
    assert {rank.outcome for rank in ranks} == {"completed"}
    assert saved_steps(run) == [1, 2, 3, 4, 5]


def test_debugging_is_a_handful_of_steps_in_this_process(make_run, engine, one_rank):
    run = make_run(data={"workers": 2}, batch={"size": 2}, train={"epochs": 3})
    parts = build_parts(run, Ranks(), engine.cpu, debug=True)
    before, children = set(processes.children(os.getpid())), set()

    def look():
        children.update(processes.children(os.getpid()))
        return False

    trainer = Trainer(parts, recorder=engine.records(run), stop_requested=look)
    assert trainer.run() == "completed"
    assert trainer.state.step == parts.num_steps == 5
    assert children <= before


# Precision


def dtypes_of_convolutions(parts):
    """The set of types that convolutions give, filled while it trains."""
    seen = set()
    for module in parts.model.module.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_half_precision_trains_like_single(make_run, engine, one_rank, precision, dtype, clip):
    changes = {"batch": {"size": 6, "accumulate": 2}, "optim": {"lr": 0.005}, "train": {"clip_grad_norm": clip}}
    single = engine.train(make_run("single", **changes), prepare=engine.without_dropout)
    run, seen = make_run("half", precision=precision, **changes), []

    def prepare(parts):
        engine.without_dropout(parts)
        parts.device = engine.from_scale(256.0)
        seen.append(dtypes_of_convolutions(parts))

    half = engine.train(run, prepare=prepare)
    assert seen == [{dtype}]  # in training and in validation
    assert {tensor.dtype for tensor in half.state.values()} == {torch.float32}
    step = {name: single.state[name] - single.initial[name] for name in single.state}
    error = {name: half.state[name] - single.state[name] for name in single.state}
    length = {
        kind: sum(v.square().sum() for v in values.values()).sqrt() for kind, values in (("s", step), ("e", error))
    }
    assert 0 < length["e"] < 0.2 * length["s"]
    scaler = checkpoints.load(run.last_checkpoint).optimizer["scaler"]
    assert (scaler["scale"] == 256) if precision == "fp16" else (scaler == {})


def test_a_step_that_overflows_in_fp16_is_left_out_and_the_scale_halved(make_run, engine, one_rank):
    run = make_run(batch={"size": 37}, precision="fp16", train={"clip_grad_norm": 1.0})
    parts = build_parts(run, Ranks(), engine.cpu)
    before = {k: v.clone() for k, v in parts.model.module.state_dict().items()}
    parts.device = engine.from_scale(2.0**60)
    trainer = Trainer(parts, recorder=engine.records(run), stop_requested=engine.never)
    assert trainer.run() == "completed"
    assert engine.identical(parts.model.module.state_dict(), before)
    assert trainer.state.scaler.get_scale() == 2.0**59


@pytest.mark.slow
def test_the_scale_is_resumed_too(make_run, engine, one_rank):
    changes = {"batch": {"size": 8}, "precision": "fp16", "optim": {"lr": 0.005}}

    def at_scale(scale):
        return lambda parts: setattr(parts, "device", engine.from_scale(scale))

    def scaler(run):
        state = checkpoints.load(run.last_checkpoint).optimizer["scaler"]
        return state["scale"], state["_growth_tracker"]

    whole = engine.train(make_run("whole", **changes), prepare=at_scale(256.0))
    run = make_run("stopped", **changes)
    engine.train(run, stop=engine.at_poll(2), prepare=at_scale(256.0))
    assert scaler(run) == (256, 2)
    assert engine.identical(engine.train(run, prepare=at_scale(1024.0)).state, whole.state)
    assert scaler(run) == (256, 5)


# What it records


def recorded(make_run, engine, **changes):
    run = make_run(batch={"size": 4}, **changes)
    parts, console = build_parts(run, Ranks(), engine.cpu), io.StringIO()
    recorder = Recorder(run, parts.recipe, attempt=1, console=console, num_steps=parts.num_steps)
    try:
        trainer = Trainer(parts, recorder=recorder, stop_requested=engine.never)
        trainer.run()
    finally:
        recorder.close()
    return run, console.getvalue()


def test_windows_of_steps_are_recorded_with_what_lies_in_them(make_run, engine, one_rank):
    run, console = recorded(make_run, engine, tracking={"log_every": 4}, train={"epochs": 2})
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    found = [(line["split"], line["step"], line["epoch"], line["samples"]) for line in lines]
    assert found == [
        ("train", 4, 0, 16),
        ("train", 8, 0, 16),
        ("val", 10, 0, 23),
        ("train", 12, 1, 4 + 1 + 8),
        ("train", 16, 1, 16),
        ("train", 20, 1, 13),
        ("val", 20, 1, 23),
    ]
    for line in lines:
        assert {"time", "attempt", "loss", "top1", "top5"} < line.keys()
        assert 0 <= line["top1"] <= line["top5"] <= 1
        extra = (
            {"lr", "grad_norm", "images_per_s", "data_wait"}
            if line["split"] == "train"
            else {"f1", "per_class", "confusion"}
        )
        assert extra < line.keys()
    status = run.read_status()
    assert (status["state"], status["epoch"], status["step"]) == ("completed", 2, 20)
    assert status["best"]["step"] in (10, 20)
    assert "epoch 2/2  step 20/20" in console


@pytest.mark.filterwarnings("ignore:Encountered")
def test_training_that_diverges_ends_with_an_error_that_says_so(make_run, engine, one_rank):
    with pytest.raises(TrainingError, match=r"loss|finite|NaN|nan"):
        recorded(make_run, engine, optim={"lr": 1e20})
